"""read and dot on a GPU. Both wait for table rows from anywhere in memory, so what counts is how many bytes of them are
asked for before the first is needed: 4 KB a warp, eight loads of 16 bytes a thread.

Rows that are not in the table are not loaded; what depends on one is NaN.

Letters: T tokens, K rows a token, S slots, V width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlayers.ops.gpu.launch import launch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WARP_BYTES = 512  # what one load instruction of a warp asks for, 16 bytes a thread
_LOADS = 8  # of them in flight
_FEW_PROGRAMS = 256  # up to which a GPU is not filled
_FEW_BYTES = 128  # of a row, then, for each program


def takes(table_SV: Tensor) -> bool:
    """Whether the kernels know the dtype and the layout of a table."""
    return table_SV.dtype in _DTYPES and (table_SV.stride(1) == 1 or table_SV.shape[1] <= 1)


def read(table_SV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The operation. A slot outside of the table makes its token NaN, unless its weight is 0."""
    if not takes(table_SV):
        return NotImplemented
    (tokens, topk), width = slots_TK.shape, table_SV.shape[1]
    y_TV = table_SV.new_empty(tokens, width, dtype=torch.float32)
    columns, rows, warps = read_blocks(tokens, topk, width, table_SV.element_size())
    programs = tokens * triton.cdiv(width, columns)
    _launch(_read_kernel, programs, table_SV, slots_TK, weights_TK, y_TV, COLUMNS=columns, ROWS=rows, num_warps=warps)
    return y_TV


def dot(table_SV: Tensor, slots_TK: Tensor, outputs_TV: Tensor) -> Tensor:
    """The operation. A slot outside of the table has NaN."""
    if not takes(table_SV):
        return NotImplemented
    (tokens, topk), width = slots_TK.shape, table_SV.shape[1]
    d_TK = table_SV.new_empty(tokens, topk, dtype=torch.float32)
    columns, rows, warps = read_blocks(2**31, topk, width, table_SV.element_size())
    settings = {"COLUMNS": columns, "ROWS": rows, "PART": min(columns, 16 // table_SV.element_size())}
    programs = tokens * triton.cdiv(topk, rows)
    _launch(_dot_kernel, programs, table_SV, slots_TK, outputs_TV, d_TK, **settings, num_warps=warps)
    return d_TK


def _launch(kernel, programs: int, table_SV: Tensor, slots_TK: Tensor, factor: Tensor, out: Tensor, **settings) -> None:
    num_slots, width = table_SV.shape
    launch(
        kernel,
        (programs,),
        table_SV,
        slots_TK.contiguous(),
        factor.contiguous(),
        out,
        num_slots,
        TOPK=slots_TK.shape[1],
        WIDTH=width,
        STRIDE=table_SV.stride(0),
        **settings,
    )


def read_blocks(tokens: int, topk: int, width: int, itemsize: int) -> tuple[int, int, int]:
    """(columns of a program, rows that it loads at once, its warps)."""
    # One warp: whatever is summed stays in its registers, and no other is waited for.
    columns, warps = min(_WARP_BYTES // itemsize, triton.next_power_of_2(max(1, width))), 1
    if tokens * triton.cdiv(width, columns) <= _FEW_PROGRAMS:
        # A token or a few: as many programs as there are, each with all rows in flight at once.
        columns, warps = min(columns, _FEW_BYTES // itemsize), 8
    rows = _LOADS * warps * _WARP_BYTES // (columns * itemsize)
    return columns, min(rows, triton.next_power_of_2(max(1, topk))), warps


@triton.jit
def _read_kernel(
    table,
    slots,
    weights,
    y,
    num_slots,
    TOPK: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Programs of one token are neighbours, so that the parts of a row are asked for at about one time.
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, TOPK, ROWS):
        k = start + tl.arange(0, ROWS)
        slot = tl.load(slots + token * TOPK + k, mask=k < TOPK, other=-1).to(tl.int64)
        is_slot = (slot >= 0) & (slot < num_slots)
        entries = tl.load(
            table + slot[:, None] * STRIDE + column[None, :],
            mask=is_slot[:, None] & (column < WIDTH)[None, :],
            other=0,
        )
        tl.debug_barrier()  # the assembler would spare registers and ask for a row only when the one before is there
        weight = tl.load(weights + token * TOPK + k, mask=k < TOPK, other=0).to(tl.float32)
        weight = tl.where(is_slot | (weight == 0), weight, float("nan"))
        sums += tl.sum(entries.to(tl.float32) * weight[:, None], 0)
    tl.store(y + token * WIDTH + column, sums, mask=column < WIDTH)


@triton.jit
def _dot_kernel(
    table,
    slots,
    outputs,
    d,
    num_slots,
    TOPK: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    BLOCKS: tl.constexpr = (TOPK + ROWS - 1) // ROWS
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    k = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + token * TOPK + k, mask=k < TOPK, other=-1).to(tl.int64)
    is_slot = (slot >= 0) & (slot < num_slots)
    sums = tl.zeros([ROWS, COLUMNS // PART], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        output = tl.load(outputs + token * WIDTH + column, mask=column < WIDTH, other=0).to(tl.float32)
        entries = tl.load(
            table + slot[:, None] * STRIDE + column[None, :],
            mask=is_slot[:, None] & (column < WIDTH)[None, :],
            other=0,
        )
        tl.debug_barrier()  # as in read
        products = entries.to(tl.float32) * output[None, :]
        # What a thread loads of a row is summed at once: sums by column would take as many registers as columns.
        sums += tl.sum(tl.reshape(products, [ROWS, COLUMNS // PART, PART]), 2)
    tl.store(d + token * TOPK + k, tl.where(is_slot, tl.sum(sums, 1), float("nan")), mask=k < TOPK)
