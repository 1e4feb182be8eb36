"""The row step on a GPU: from factored row gradients to updated rows, each row that was read passed over once.

Entries (slot, weight, token) are sorted by slot, and cut into blocks of equal length whatever the slots are, so that no
program has more to do than another even where all tokens read the same few rows. A program walks one block: it sums the
run of entries of a slot, and applies the rule to the row where the run ends. The sums of a run that crosses a border
are put aside, at most two a block, and added by a second kernel in the order of the blocks. No sum depends on which
program is first, so the result is the same each time.

What has no fixed size on the host (rows that were read, runs) is never asked for: nothing waits for the device.

Letters: M entries, S slots, V width, R tokens of all parts, B blocks of entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlayers.ops.gpu.launch import launch
from memlayers.ops.gpu.rules import ADAM, ROW_ADAGRAD, SGD, SQUARES, apply_rule, log_of, signed32
from memlayers.ops.row_step import RULES, Step, row_adagrad
from memlayers.ops.row_sum import Part, clipping_scale, parts_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 8192  # of a row that one program can hold, for a rule that needs its mean
_BLOCK = 512  # entries of a program of the small kernels


def block_length(count: int) -> int:
    """Entries of a block, for M of them.

    2,048 to 4,096 blocks of all columns fill a large GPU a few times over, so that those that end late matter little,
    and bound the memory of sums put aside (8,192 rows); fewer than 32 entries a block would put too many of them aside.
    """
    return max(32, triton.next_power_of_2(max(1, count)) // 4096)


def blocks(width: int, rule: int, are_mixed: bool) -> tuple[int, int]:
    """(columns, warps) of a program.

    8 elements a thread: two 16-byte loads of each float32 operand, or one of a 16-bit one. With a row, its two moments
    and a gradient over 100 bytes a thread are on their way, at a number of registers (64) that leaves 16 programs of 64
    threads an SM: several times what hides the latency of memory. Operands of different sizes take 4 a thread, or a
    thread would not hold the same columns of each. A rule that needs the whole row takes all columns.
    """
    columns = triton.next_power_of_2(max(32, width))
    if rule != ROW_ADAGRAD.value:
        columns = min(columns, 256 if are_mixed else 512)
    return columns, min(16, max(1, columns // (128 if are_mixed else 256)))


class SortedEntries:
    """The entries of several parts by slot; those that are no reads (their weight is 0) come last, as slot S."""

    def __init__(self, parts: list[Part], num_slots: int):
        self.num_slots = num_slots
        self.grad_RV = _joined([part.grad_TV for part in parts])
        self.width = self.grad_RV.shape[1]
        self.count = sum(part.slots_TK.numel() for part in parts)
        new, num_tokens = self.grad_RV.new_empty, self.grad_RV.shape[0]
        # Half the bytes to sort where they will do.
        key_M = new(self.count, dtype=torch.int32 if num_slots < 2**31 - 1 else torch.int64)
        token_M = new(self.count, dtype=torch.int32 if num_tokens < 2**31 else torch.int64)
        weight_M = new(self.count, dtype=torch.float32)
        first_entry = first_token = 0
        for slots_TK, weights_TK, _ in parts:
            size = slots_TK.numel()
            launch(
                _number_entries,
                (triton.cdiv(size, _BLOCK),),
                slots_TK.reshape(-1).contiguous(),  # what is expanded, or every other column, reshapes to a view
                weights_TK.reshape(-1).contiguous(),
                key_M,
                token_M,
                weight_M,
                size,
                slots_TK.shape[1],
                first_entry,
                first_token,
                num_slots,
                BLOCK=_BLOCK,
                num_warps=8,
            )
            first_entry, first_token = first_entry + size, first_token + slots_TK.shape[0]
        self.key_M, order_M = key_M.sort(stable=True)
        self.token_M, self.weight_M = torch.empty_like(token_M), torch.empty_like(weight_M)
        launch(
            _reorder,
            (triton.cdiv(self.count, _BLOCK),),
            order_M,
            token_M,
            weight_M,
            self.token_M,
            self.weight_M,
            self.count,
            BLOCK=_BLOCK,
            num_warps=8,
        )


def step_(step: Step) -> None:
    """Row steps of contiguous tables and states, of rows that a program can hold where a rule needs their mean."""
    if not _takes(step):
        return NotImplemented
    entries = SortedEntries(step.parts, len(step.table_SV))
    scale = (
        None
        if step.max_norm is None
        else clipping_scale(_norm(entries) if step.norm is None else step.norm, step.max_norm)
    )
    _launch_step(
        RULES.index(step.rule),
        entries,
        step.table_SV,
        *step.states,
        scale=scale,
        seed=step.seed,
        first_column=step.first_column,
        **step.settings,
    )
    return None


def _takes(step: Step) -> bool:
    """Whether the kernels know these dtypes and layouts."""
    table_SV, states = step.table_SV, step.states
    if any(given.dtype not in _FLOATS for given in (table_SV, *(part.grad_TV for part in step.parts))):
        return False
    if table_SV.numel() == 0 or not all(whole.is_contiguous() for whole in (table_SV, *states)):
        return False
    if step.rule is row_adagrad and table_SV.shape[1] > _WIDEST:
        return False
    moments = [state for state in states if state.ndim == 2]
    numbers = [state for state in states if state.ndim == 1]
    number_dtype = torch.int32 if moments else torch.float32
    return all(state.dtype in (torch.float32, torch.bfloat16) for state in moments) and all(
        state.dtype == number_dtype for state in numbers
    )


def row_norm(parts: list[Part], num_slots: int) -> Tensor:
    """The operation, for all but float64 gradients."""
    if any(part.grad_TV.dtype == torch.float64 for part in parts):
        return NotImplemented
    return _norm(SortedEntries(parts, num_slots))


def sum_rows(slots_TK: Tensor, weights_TK: Tensor, outputs_TV: Tensor, num_slots: int) -> Tensor:
    """The operation, for all but float64 outputs."""
    if outputs_TV.dtype == torch.float64:
        return NotImplemented
    g_SV = outputs_TV.new_zeros(num_slots, outputs_TV.shape[1], dtype=torch.float32)
    entries = SortedEntries(parts_of([slots_TK], [weights_TK], [outputs_TV]), num_slots)
    _launch_step(SGD.value, entries, g_SV, scale=None, seed=-1, first_column=0, lr=-1.0)  # one step up from zero
    return g_SV


def _norm(entries: SortedEntries) -> Tensor:
    """Of the summed rows, a float32 scalar."""
    length = block_length(entries.count)
    columns, _ = blocks(entries.width, SQUARES.value, are_mixed=False)
    places = triton.cdiv(entries.count, length) * triton.cdiv(entries.width, columns)
    squares_2P = entries.grad_RV.new_zeros(2, places, dtype=torch.float32)
    _walk_and_finish(SQUARES.value, entries, squares_2P, None, None, None, None, -1, 0, (0.0,) * 7)
    return squares_2P.sum(dtype=torch.float64).float().sqrt()


def _launch_step(
    rule: int,
    entries: SortedEntries,
    table_SV: Tensor,
    first: Tensor | None = None,
    second: Tensor | None = None,
    steps_S: Tensor | None = None,
    *,
    scale: Tensor | None,
    seed: int,
    first_column: int,
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
) -> None:
    if steps_S is not None:
        # Before the rows, since the programs of a row's columns must all see the same count.
        launch(
            _count_reads,
            (triton.cdiv(entries.count, _BLOCK),),
            entries.key_M,
            steps_S,
            entries.count,
            entries.num_slots,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    numbers = lr, 1 - beta1, beta2, 1 - beta2, log_of(beta1), log_of(beta2), eps
    _walk_and_finish(rule, entries, table_SV, first, second, steps_S, scale, seed, first_column, numbers)


def _walk_and_finish(
    rule: int, entries, target, first, second, steps_S, scale, seed: int, first_column: int, numbers
) -> None:
    """target: the table, or for SQUARES the sums [2, programs] of the squares of each program of either kernel."""
    length = block_length(entries.count)
    num_blocks = triton.cdiv(entries.count, length)
    operands = [entries.grad_RV] + [whole for whole in (target, first, second) if whole is not None and whole.ndim == 2]
    are_mixed = rule != SQUARES.value and len({operand.dtype.itemsize for operand in operands}) > 1
    columns, num_warps = blocks(entries.width, rule, are_mixed)
    column_blocks = triton.cdiv(entries.width, columns)
    # The sum of the run that came into a block, and of the one that begins in it and goes on.
    aside_B2V = entries.grad_RV.new_empty(num_blocks, 2, entries.width, dtype=torch.float32)
    sums = entries.key_M, entries.token_M, entries.weight_M, entries.grad_RV, aside_B2V
    sizes = entries.count, length, entries.num_slots, entries.width
    wholes = target, first, second, steps_S, scale
    constants = {"RULE": rule, "IS_STOCHASTIC": seed >= 0, "COLUMNS": columns, "num_warps": num_warps}
    seed = signed32(seed)
    launch(
        _walk, (num_blocks, column_blocks), *sums, *wholes, *sizes, entries.grad_RV.stride(0), seed, first_column,
        *numbers, **constants,
    )  # fmt: skip
    tile = max(1, min(8, 4096 // columns))
    constants["num_warps"] = max(4, num_warps)
    launch(
        _finish, (max(0, num_blocks - 1), column_blocks), entries.key_M, aside_B2V, *wholes, *sizes, seed, first_column,
        *numbers, TILE=tile, **constants,
    )  # fmt: skip


def _joined(grads: list[Tensor]) -> Tensor:
    """[R, V], its rows contiguous; a single gradient is not copied, one of mixed dtypes is float32."""
    if len(grads) == 1:
        return grads[0] if grads[0].stride(1) == 1 else grads[0].contiguous()
    if len({grad.dtype for grad in grads}) > 1:
        grads = [grad.float() for grad in grads]
    return torch.cat(grads)


@triton.jit(do_not_specialize=["count", "topk", "first_entry", "first_token"])
def _number_entries(
    slots, weights, key_M, token_M, weight_M, count, topk, first_entry, first_token, num_slots, BLOCK: tl.constexpr
):
    """The key by which an entry is sorted: its slot, or S where it is no read, or a read of no row."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    slot = tl.load(slots + entry, mask=inside, other=0)
    weight = tl.load(weights + entry, mask=inside, other=0.0).to(tl.float32)
    is_read = (weight != 0) & (slot >= 0) & (slot < num_slots)
    key = tl.where(is_read, slot, num_slots)
    place = first_entry + entry
    tl.store(key_M + place, key.to(key_M.dtype.element_ty), mask=inside)
    tl.store(token_M + place, (first_token + entry // topk).to(token_M.dtype.element_ty), mask=inside)
    tl.store(weight_M + place, weight, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _reorder(order_M, token_M, weight_M, sorted_token_M, sorted_weight_M, count, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    source = tl.load(order_M + entry, mask=inside, other=0)
    tl.store(sorted_token_M + entry, tl.load(token_M + source, mask=inside, other=0), mask=inside)
    tl.store(sorted_weight_M + entry, tl.load(weight_M + source, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _count_reads(key_M, steps_S, count, num_slots, BLOCK: tl.constexpr):
    """One more for each slot; the entry that begins a slot's run counts, so no two write to one place."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_M + entry, mask=entry < count, other=num_slots)
    before = tl.load(key_M + entry - 1, mask=(entry > 0) & (entry < count), other=-1)
    begins = (key != before) & (key < num_slots)
    steps = tl.load(steps_S + key, mask=begins, other=0)
    tl.store(steps_S + key, steps + 1, mask=begins)


@triton.jit
def _load_row(whole, key, at, column, width, is_wanted, IS_NUMBER: tl.constexpr):
    """A row's columns, or its one number, in float32; where there is no such state, 0."""
    if whole is None:
        return 0.0
    elif IS_NUMBER:
        return tl.load(whole + key, mask=is_wanted, other=0.0)
    else:
        return tl.load(whole + at, mask=column < tl.where(is_wanted, width, 0), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count", "length", "seed", "first_column"])
def _walk(
    key_M, token_M, weight_M, grad_RV, aside_B2V, target, first, second, steps_S, scale_1,
    count, length, num_slots, width, grad_stride, seed, first_column, lr, keep1, beta2, keep2, log1, log2, eps,
    RULE: tl.constexpr, IS_STOCHASTIC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of entries, some of the columns: apply the rule where a run lies in the block, else put its sum aside.

    An entry's gradient is asked for an entry ahead, so that it and the row of this one are on their way together; asked
    for side by side, the compiler would wait for the gradient first, to save registers.
    """
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    start = block * length
    key_M += start
    token_M += start
    weight_M += start
    aside_B2V += block * 2 * width
    known = tl.minimum(count - start, length + 1).to(tl.int32)  # entries that are looked at; one of the next block
    stop = tl.minimum(known, length)
    scale = 1.0
    if scale_1 is not None:
        scale = tl.load(scale_1).to(tl.float32)
    key = tl.load(key_M)
    next_key = tl.load(key_M + 1, mask=known > 1, other=-1)
    weight = tl.load(weight_M)
    gradient = grad_RV + tl.load(token_M).to(tl.int64) * grad_stride + column
    grad = tl.load(gradient, mask=column < tl.where(key < num_slots, width, 0), other=0.0)
    next_token = tl.load(token_M + 1, mask=stop > 1, other=0).to(tl.int64)
    has_begun = key != tl.load(key_M - 1, mask=block > 0, other=-1)  # here, rather than in a block before
    goes_on = False
    total = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    if key >= num_slots:
        stop = 0  # what is no read comes last: there are none here
    entry = 1  # the next one
    while entry <= stop:
        key_after = tl.load(key_M + entry + 1, mask=entry + 1 < known, other=-1)
        token_after = tl.load(token_M + entry + 1, mask=entry + 1 < stop, other=0).to(tl.int64)
        next_weight = tl.load(weight_M + entry, mask=entry < stop, other=0.0)
        is_read = key < num_slots
        is_last = (key != next_key) & is_read
        is_whole = is_last & has_begun
        at = key.to(tl.int64) * width + column
        if RULE != SQUARES:
            row = _load_row(target, key, at, column, width, is_whole, False)
        first_row = _load_row(first, key, at, column, width, is_whole, RULE == ROW_ADAGRAD)
        second_row = _load_row(second, key, at, column, width, is_whole, False)
        times = 1
        if RULE == ADAM:
            times = tl.load(steps_S + key, mask=is_whole, other=1)
        gradient = grad_RV + next_token * grad_stride + column
        is_next_read = (entry < stop) & (next_key < num_slots)
        next_grad = tl.load(gradient, mask=column < tl.where(is_next_read, width, 0), other=0.0)
        total += weight * grad.to(tl.float32)
        if is_last:
            if has_begun == 0:
                tl.store(aside_B2V + column, total, mask=inside)
            elif RULE == SQUARES:
                squares += total * total
            else:
                apply_rule(
                    total * scale, target, first, second, row, first_row, second_row, times, key, column, inside,
                    width, seed, first_column, lr, keep1, beta2, keep2, log1, log2, eps, RULE, IS_STOCHASTIC,
                )  # fmt: skip
        goes_on = (key == next_key) & is_read
        total = tl.where(key == next_key, total, 0.0)
        has_begun = has_begun | (key != next_key)
        key, next_key, next_token = next_key, key_after, token_after
        weight, grad = next_weight, next_grad
        entry += 1
    if goes_on:
        tl.store(aside_B2V + tl.where(has_begun, width, 0) + column, total, mask=inside)
    if RULE == SQUARES:
        tl.store(target + block * tl.num_programs(1) + tl.program_id(1), tl.sum(squares))


@triton.jit(do_not_specialize=["count", "length", "seed", "first_column"])
def _finish(
    key_M, aside_B2V, target, first, second, steps_S, scale_1,
    count, length, num_slots, width, seed, first_column, lr, keep1, beta2, keep2, log1, log2, eps,
    TILE: tl.constexpr, RULE: tl.constexpr, IS_STOCHASTIC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The run that begins in a block and goes on in the next, if there is one: add its sums and apply the rule."""
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    border = (block + 1) * length
    key = tl.load(key_M + border - 1)
    begins_before = (key == tl.load(key_M + border - length)) & (
        key == tl.load(key_M + border - length - 1, mask=block > 0, other=-1)
    )
    is_mine = (key == tl.load(key_M + border)) & (key < num_slots) & (begins_before == 0)
    square = 0.0
    if is_mine:
        at = key.to(tl.int64) * width + column
        sums = tl.zeros([TILE, COLUMNS], tl.float32)
        tile = block + 1 + tl.arange(0, TILE)
        going = True
        while going:
            is_part = tl.load(key_M + tile * length, mask=tile * length < count, other=-1) == key
            places = aside_B2V + tile[:, None] * 2 * width + column[None, :]
            sums += tl.load(places, mask=is_part[:, None] & inside[None, :], other=0.0)
            tile += TILE
            border += TILE * length
            going = tl.load(key_M + border, mask=border < count, other=-1) == key
        # Not before the loop, in which the compiler would have no registers for it.
        total = tl.load(aside_B2V + (block * 2 + 1) * width + column, mask=inside, other=0.0)
        total += tl.sum(sums, 0)
        if RULE == SQUARES:
            square = tl.sum(total * total)
        else:
            if scale_1 is not None:
                total *= tl.load(scale_1).to(tl.float32)
            row = _load_row(target, key, at, column, width, is_mine, False)
            first_row = _load_row(first, key, at, column, width, is_mine, RULE == ROW_ADAGRAD)
            second_row = _load_row(second, key, at, column, width, is_mine, False)
            times = 1
            if RULE == ADAM:
                times = tl.load(steps_S + key)
            apply_rule(
                total, target, first, second, row, first_row, second_row, times, key, column, inside,
                width, seed, first_column, lr, keep1, beta2, keep2, log1, log2, eps, RULE, IS_STOCHASTIC,
            )  # fmt: skip
    if RULE == SQUARES:
        place = (tl.num_programs(0) + 1 + block) * tl.num_programs(1) + tl.program_id(1)
        tl.store(target + place, square)
