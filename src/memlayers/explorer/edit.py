"""Changing slots by hand: freeze_slots, reset_slots, grow_table. Optimizers are kept in step.

Letters: H heads, N sub-keys a codebook, S slots, K rows a head reads, C keys of a codebook (N, or S of flat keys).
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memlayers.diagnosis.examine import as_optimizers
from memlayers.diagnosis.subjects import Subject, chosen_rows, find_subjects, has_lost_owner
from memlayers.experts import ExpertTable, InputTable
from memlayers.keys import FlatKeys, NormalisedKeys, ProductKeys
from memlayers.layer import MemoryLayer
from memlayers.ops.row_gradient import RowHookArgument
from memlayers.optim.chosen_rows import slot_mask
from memlayers.usage import UsageMeter
from memlayers.values import ValueTable, value_tables

Model = TypeVar("Model", bound=nn.Module)
Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None
NOISE = 0.1  # of a sub-key that starts again, over the size of the one beside which it starts
READS_A_KEY = 10  # of a head, on average, before a key that was not read counts as dead
# The parts of the grown codebooks that the heads take, one after the other: of the first and of the second codebook.
_QUARTERS = ((0, 0), (1, 1), (0, 1), (1, 0))


def freeze_slots(memory: MemoryLayer | ValueTable, slots: Tensor | Sequence[int]) -> ExitStack:
    """Keeps rows of a table as they are while the others train, bit for bit, and so their optimizer's state.

        frozen = freeze_slots(layer, slots)
        ...
        frozen.close()  # or: with freeze_slots(layer, slots): ...

    It freezes what slots say (and what experts listen to), not when they are read: sub-keys belong to many slots, and
    train on. It ends with `release` of the optimizer, and is in no checkpoint.

    Args:
        memory: a memory or its table, in row mode: build the optimizer first.
        slots: numbers, or a mask [S] of bool.

    Raises:
        ValueError: a table without a row optimizer, whose dense optimizer would move rows without a gradient, too; a
            slot that the table does not have.
    """
    table = memory.values if isinstance(memory, MemoryLayer) else memory
    if not isinstance(table, ValueTable):
        raise ValueError(f"memory must be a MemoryLayer or a ValueTable, got a {type(memory).__name__}")
    if table.untrainable:
        raise ValueError(table.untrainable)
    keep_S = ~slot_mask("slots", slots, len(table.weight), table.weight.device)
    stack = ExitStack()
    for one in value_tables(table):
        if one.row_gradient is None or has_lost_owner(one):
            raise ValueError(
                "memory must be in row mode to freeze slots, got a table without a row optimizer: a dense one moves "
                "all rows, by momentum if not by gradients. Build MemoryAdamW or a row optimizer first"
            )
        stack.callback(one.register_row_hook(partial(_keep, keep_S)).remove)
    return stack


def _keep(keep_S: Tensor, gradient: RowHookArgument) -> None:
    gradient.keep(keep_S)


@torch.no_grad()
def reset_slots(model: nn.Module, usage: Mapping[str, UsageMeter], *, optimizer: Optimizers = None) -> dict[str, int]:
    """Lets dead slots start again, where they will be found.

        with SlotTrace(model) as trace:
            ...  # some batches
        reset_slots(model, trace.usage, optimizer=optimizer)

    A sub-key (a key, of flat keys) that a head never read starts again beside one that it reads, the most read ones
    first: a tenth of its size away, with its optimizer state. Rows that no head read say at first what the rows beside
    which they start say; those whose sub-keys are all in use, and which nobody reads together, get fresh values and no
    optimizer state. Rows that some head reads stay as they are. Outputs change by what the new neighbours take from the
    K of a head. Draws from PyTorch's generator: with the same seed on each rank, replicas stay alike.

    Args:
        model: with memories; all of them are looked at.
        usage: a meter of each, by name, as `SlotTrace.usage` has them.
        optimizer: the one, or all, that train the model.

    Returns:
        How many keys started again, by memory.

    Raises:
        ValueError: meters of other memories, or of too few tokens to tell what is dead; an optimizer that does not hold
            a table that is trained, or has states of another shape than a weight (Adafactor); gradients that were not
            used yet; frozen slots or chosen rows; tables in columns, in files or quantised.
    """
    subjects, optimizers = find_subjects(model), as_optimizers(optimizer)
    for subject in subjects:
        _require_editable(subject, optimizers, "reset_slots")
        meter, config = usage.get(subject.name), subject.layer.config
        if not isinstance(meter, UsageMeter) or meter.layer is not subject.layer:
            raise ValueError(f"usage must have a meter of each memory of the model, got none of {subject.name}")
        if (counted := meter.state_dict()["count_HS"].shape[1]) != config.slots:
            raise ValueError(
                f"usage of {subject.name} must be counted after grow_table, got a meter for {counted:,} slots of a "
                f"memory that has {config.slots:,} now: make another"
            )
        keys, tokens = subject.layer.keys.weight.shape[-2], int(meter.state_dict()["tokens"])
        if tokens * config.topk < READS_A_KEY * keys:
            raise ValueError(
                f"usage of {subject.name} must be of at least {-(-READS_A_KEY * keys // config.topk)} tokens to tell "
                f"which of its {keys} keys a head never reads, got {tokens}"
            )
    counts = {subject: usage[subject.name].state_dict()["count_HS"] for subject in subjects}
    restarted = {}
    parents: dict[ValueTable, Tensor] = {}
    for subject in subjects:
        from_HC = [_parents(reads_HC) for reads_HC in _reads_of_keys(subject, counts[subject])]
        restarted[subject.name] = _restart_keys(subject, from_HC, optimizers)
        itself_S = torch.arange(subject.layer.config.slots, device=from_HC[0].device)
        parent_S = parents.setdefault(subject.table, itself_S.clone())
        for head in range(subject.layer.config.heads):  # the first head that has one decides
            of_head_S = from_HC[0][head]
            if len(from_HC) == 2:
                of_head_S = (of_head_S[:, None] * len(of_head_S) + from_HC[1][head]).flatten()
            parent_S.copy_(torch.where(parent_S == itself_S, of_head_S, parent_S))
    for table, parent_S in parents.items():
        reads_S = sum(counts[one].sum(0) for one in subjects if one.table is table)
        dead_S = torch.as_tensor(reads_S == 0)
        fresh = (dead_S & (parent_S == torch.arange(len(parent_S), device=parent_S.device))).nonzero()[:, 0]
        rows = dead_S.nonzero()[:, 0]
        for one in value_tables(table):
            for tensor in _with_state(one.weight, optimizers):
                tensor[rows] = tensor[parent_S[rows]]
                tensor[fresh] = 0
            one.weight[fresh] = torch.randn_like(one.weight[fresh]) * one.std
    return restarted


def _reads_of_keys(subject: Subject, counts_HS: Tensor) -> list[Tensor]:
    """How often each head read each key [H, C] of each codebook."""
    if isinstance(subject.layer.keys, FlatKeys):
        return [counts_HS]
    counts_HNN = counts_HS.unflatten(1, (subject.layer.config.num_subkeys, -1))
    return [counts_HNN.sum(2), counts_HNN.sum(1)]


def _parents(reads_HC: Tensor) -> Tensor:
    """Of each key [H, C] the one beside which it starts again: itself if it is read, else one of the most read."""
    parent_HC = torch.arange(reads_HC.shape[1], device=reads_HC.device).repeat(len(reads_HC), 1)
    for head, reads_C in enumerate(reads_HC):
        dead, order = (reads_C == 0).nonzero()[:, 0], reads_C.argsort(descending=True, stable=True)
        read = order[: len(order) - len(dead)]
        parent_HC[head, dead] = read[torch.arange(len(dead), device=dead.device) % len(read)]
    return parent_HC


def _restart_keys(subject: Subject, from_HC: list[Tensor], optimizers: list[torch.optim.Optimizer]) -> int:
    weight = subject.layer.keys.weight
    restarted = 0
    for codebook, parent_HC in enumerate(from_HC):
        heads, keys = (parent_HC != torch.arange(parent_HC.shape[1], device=parent_HC.device)).nonzero(as_tuple=True)
        for tensor in _with_state(weight, optimizers):
            of_codebook = tensor if len(from_HC) == 1 else tensor[codebook]
            of_codebook[heads, keys] = of_codebook[heads, parent_HC[heads, keys]]
        of_codebook = weight if len(from_HC) == 1 else weight[codebook]
        beside = of_codebook[heads, keys]
        size = beside.float().square().mean(-1, keepdim=True).sqrt()
        of_codebook[heads, keys] = (beside + NOISE * size * torch.randn_like(beside)).to(beside.dtype)
        restarted += len(keys)
    return restarted


@torch.no_grad()
def grow_table(model: Model, *, optimizer: Optimizers = None) -> Model:
    """Doubles the sub-keys of every memory of a model, in place: N -> 2 N, and so S -> 4 S slots.

    The outputs stay (in float32 to rounding), and new slots are read at once. Slots are pairs of sub-keys, so 2 N
    sub-keys make 4 N * N slots, and there is no growth to 2 S. A copy of a sub-key beside it would take places among
    the K of its head from others, and change outputs; a new one that nothing finds would never be trained. So each head
    keeps its N sub-keys and their scores, and moves with them into one of the four quarters of the grown table, in
    turn; rows are copied to all four, with their optimizer state. Four heads that shared S rows thus train S each.

    The other N sub-keys of a head wait in the middle of those in use, where hardly a query finds them: their score is
    the mean score. `reset_slots` starts them after some steps. Until then, of the new slots those are read that the
    second, third and fourth heads of a table read (a third of them for each of these heads): with 2 heads, few.

    Call it on every rank of several processes, between `zero_grad` and the next forward pass. Meters and traces that
    were made before are for the old size.

    Args:
        model: with memories; it may be saved and loaded as before, with its new size.
        optimizer: the one, or all, that train the model; their state grows with it. Needed where a row optimizer owns a
            table.

    Returns:
        `model` itself.

    Raises:
        ValueError: a table that one head alone reads; a ``topk`` above an eighth of N; more than 2**16 sub-keys; keys
            or tables of other classes, in columns, in files or quantised; a model in `DistributedDataParallel`; an
            optimizer that does not hold a table that is trained, or has states of another shape than a weight
            (Adafactor); gradients that were not used yet; frozen slots or chosen rows. The model is then as it was.
    """
    subjects, optimizers = find_subjects(model), as_optimizers(optimizer)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError("model must not be wrapped in DistributedDataParallel: grow it first, and wrap it then")
    readers: dict[ValueTable, int] = {}
    for subject in subjects:
        _require_editable(subject, optimizers, "grow_table")
        config = subject.layer.config
        if 2 * config.num_subkeys > 2**16:
            raise ValueError(f"num_subkeys must be at most {2**15} to be doubled, got {config.num_subkeys}")
        if config.keys == "product" and 8 * config.topk > config.num_subkeys:
            raise ValueError(
                f"topk must be at most an eighth of num_subkeys = {config.num_subkeys}, so that new sub-keys wait "
                f"without being found, got {config.topk}"
            )
        readers[subject.table] = readers.get(subject.table, 0) + config.heads
    if alone := [subject.name for subject in subjects if readers[subject.table] < 2]:
        raise ValueError(
            f"a table must be read by at least 2 heads to grow, got 1 at {', '.join(alone)}: new slots are read by "
            "heads that part ways, and one head would leave them unread. Train with more sub-keys from the start"
        )
    place = dict.fromkeys(readers, 0)
    for subject in subjects:
        layer, heads = subject.layer, subject.layer.config.heads
        quarters = [_QUARTERS[(place[subject.table] + head) % 4] for head in range(heads)]
        place[subject.table] += heads
        _exchange(layer.keys, optimizers, partial(_grown_keys, layer.keys, quarters))
        layer.config = dataclasses.replace(layer.config, num_subkeys=2 * layer.config.num_subkeys)
    for table in readers:
        (config, keys), *_ = ((one.layer.config, one.layer.keys) for one in subjects if one.table is table)
        slots_S = torch.arange(config.slots, device=table.weight.device)
        parent_S = slots_S % (config.slots // 4)
        if not isinstance(keys, FlatKeys):
            old = config.num_subkeys // 2
            parent_S = slots_S // (2 * old) % old * old + slots_S % (2 * old) % old
        for one in value_tables(table):
            owner = None if one.row_gradient is None else one.row_gradient.owner()
            one.release()
            _exchange(one, optimizers, partial(_rows, parent_S))
            if owner is not None:
                one.own(owner)
    for described in {id(one): one for one in (vars(part).get("config") for part in model.modules())}.values():
        if hasattr(described, "set_placement"):
            _describe_grown(model, described)
    return model


def _describe_grown(model: nn.Module, described: Any) -> None:
    """Has what was described by one configuration be so by another, since models may share a configuration."""
    grown, config = copy.copy(described), described.placement.config
    config = dataclasses.replace(config, num_subkeys=2 * config.num_subkeys)
    grown.set_placement(dataclasses.replace(described.placement, config=config))
    for module in model.modules():
        if vars(module).get("config") is described:
            module.config = grown


def _rows(parent_S: Tensor, tensor: Tensor) -> Tensor:
    return tensor[parent_S]


def _grown_keys(keys: ProductKeys | FlatKeys, quarters: Sequence[tuple[int, int]], tensor: Tensor) -> Tensor:
    """Keys, or a state of theirs, of twice as many sub-keys (of four times as many flat keys)."""

    def placed(part_CQ: Tensor, times: int, at: int) -> Tensor:
        middle_Q = part_CQ.mean(0)
        if isinstance(keys, NormalisedKeys) and tensor is keys.weight:
            # Too short to be made a unit vector again: its score is the mean cosine.
            middle_Q = keys.least_norm * nn.functional.normalize(part_CQ, dim=-1).mean(0)
        grown = middle_Q.repeat(times * len(part_CQ), 1)
        grown[at * len(part_CQ) : (at + 1) * len(part_CQ)] = part_CQ
        return grown

    if isinstance(keys, FlatKeys):
        return torch.stack([placed(part, 4, _QUARTERS.index(at)) for part, at in zip(tensor, quarters, strict=True)])
    by_codebook = [
        torch.stack([placed(part, 2, quarter[codebook]) for part, quarter in zip(of_codebook, quarters, strict=True)])
        for codebook, of_codebook in enumerate(tensor)
    ]
    return torch.stack(by_codebook)


def _exchange(module: nn.Module, optimizers: list[torch.optim.Optimizer], grown: Callable[[Tensor], Tensor]) -> None:
    """Gives a module, and the optimizers that train it, a larger weight in place of its own."""
    old: nn.Parameter = module.weight  # type: ignore[assignment]
    new = nn.Parameter(grown(old), requires_grad=old.requires_grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if one is old else one for one in group["params"]]
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            is_of_rows = {name: torch.is_tensor(one) and one.shape[:1] == old.shape[:1] for name, one in state.items()}
            optimizer.state[new] = {name: grown(one) if is_of_rows[name] else one for name, one in state.items()}
    module.weight = new


def _with_state(weight: nn.Parameter, optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    """The weight, and what optimizers keep of each of its rows."""
    states = [optimizer.state[weight] for optimizer in optimizers if weight in optimizer.state]
    held = [one for state in states for one in state.values()]
    return [weight, *(one for one in held if torch.is_tensor(one) and one.shape[:1] == weight.shape[:1])]


def _require_editable(subject: Subject, optimizers: list[torch.optim.Optimizer], what: str) -> None:
    keys = subject.layer.keys
    if type(keys) not in (ProductKeys, NormalisedKeys, FlatKeys):
        raise ValueError(f"{what} needs keys of memlayers, got a {type(keys).__name__} at {subject.name}")
    held = {one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    _require_states_of_elements(keys.weight, optimizers, what)
    for table in subject.tables:
        weight = table._parameters.get("weight")  # none of a table of few bits, or of one that is mapped
        if type(table) not in (ValueTable, ExpertTable, InputTable) or type(weight) is not nn.Parameter:
            raise ValueError(
                f"{what} needs tables in memory, whole and not quantised, got a {type(table).__name__} with a "
                f"{type(weight).__name__} at {subject.name}"
            )
        gradient = table.row_gradient
        if (gradient is not None or optimizers) and table.weight.requires_grad and table.weight not in held:
            raise ValueError(
                f"optimizer must be the one that trains the table of {subject.name}, whose state would be lost"
            )
        if gradient is not None and gradient.has_hooks:
            raise ValueError(
                f"{what} needs a table without row hooks, got one at {subject.name}: close freeze_slots first"
            )
        if chosen_rows(table) is not None:
            raise ValueError(
                f"{what} needs an optimizer that may move all rows, got one with rows chosen at {subject.name}: call "
                "choose_rows(None) first, and choose again afterwards"
            )
        _require_states_of_elements(table.weight, optimizers, what, by_row=gradient is not None)
        is_pending = any(one.grad is not None for one in (table.weight, keys.weight) if one in held)
        if is_pending or (gradient is not None and not gradient.is_empty):
            raise ValueError(
                f"gradients of {subject.name} must have been used and cleared: call optimizer.zero_grad() first"
            )


def _require_states_of_elements(
    weight: nn.Parameter, optimizers: list[torch.optim.Optimizer], what: str, *, by_row: bool = False
) -> None:
    shapes = [weight.shape, weight.shape[:1]] if by_row else [weight.shape]
    for optimizer in optimizers:
        for name, state in optimizer.state.get(weight, {}).items():
            if torch.is_tensor(state) and state.numel() > 1 and state.shape not in shapes:
                raise ValueError(
                    f"{what} needs optimizers with states of the shape of a weight, {[*weight.shape]}, got {name!r} of "
                    f"{[*state.shape]} in {type(optimizer).__name__}: leave that optimizer out, and build it anew "
                    "afterwards"
                )
