"""What the machine can do at the layer's shapes: matrix products, streams, random rows. No layer can beat their sum.

Letters: T tokens, D model width, H heads, Q query width of a head, N sub-keys, S slots, V value width, R rows a token.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.bench.shapes import Shape

Call = Callable[[], object]

SumRows = Callable[[Tensor, Tensor, Tensor], object]  # (table [S, V], slots [T, R], output [T, V])
UpdateRows = Callable[[Tensor, Tensor, Tensor, Tensor], object]  # (three tables [S, V], slots [R])

_STREAM_BYTES = 2**28  # of one array: several times any cache
_TIMES_ON_A_GPU = 4  # so that what begins and ends such a pass is nothing beside it


def query_projection(shape: Shape, device: torch.device) -> dict[str, Call]:
    """[T, D] @ [D, H * Q], the ways that torch offers: the limit is the best of them."""
    x_TD = torch.randn(shape.tokens, shape.dim, device=device)
    weight_FD = torch.randn(shape.heads * shape.query_dim, shape.dim, device=device)
    weight_DF, output_TF = weight_FD.t().contiguous(), x_TD @ weight_FD.t()
    return {
        "weights by rows": lambda: torch.mm(x_TD, weight_FD.t(), out=output_TF),
        "weights by columns": lambda: torch.mm(x_TD, weight_DF, out=output_TF),
    }


def key_products(shape: Shape, device: torch.device) -> dict[str, Call]:
    """2 * H times [T, Q/2] @ [Q/2, N] on queries as the projection leaves them, [T, H * Q]; the best is the limit."""
    half = shape.query_dim // 2
    query = torch.randn(shape.tokens, shape.heads, 2, half, device=device)
    keys = torch.randn(2, shape.heads, shape.num_subkeys, half, device=device)
    turned = keys.transpose(-1, -2).contiguous()
    output = torch.empty(2, shape.heads, shape.tokens, shape.num_subkeys, device=device)
    pairs = [(side, head) for side in range(2) for head in range(shape.heads)]

    def one_by_one(keys_of: Callable[[int, int], Tensor]) -> None:
        for side, head in pairs:
            torch.mm(query[:, head, side], keys_of(side, head), out=output[side, head])

    return {
        "all at once": lambda: torch.matmul(query.permute(2, 1, 0, 3), turned, out=output),
        "one by one": lambda: one_by_one(lambda side, head: keys[side, head].t()),
        "one by one, keys by columns": lambda: one_by_one(lambda side, head: turned[side, head]),
    }


def product_flops(shape: Shape) -> tuple[float, float]:
    """Floating-point operations of the query projection and of the key products."""
    rows = 2.0 * shape.tokens * shape.heads * shape.query_dim
    return rows * shape.dim, rows * shape.num_subkeys


def streams(device: torch.device, sum_rows: dict[str, SumRows]) -> dict[str, tuple[dict[str, Call], float]]:
    """Ways to stream, and the bytes that each moves: a read, and Adam's read and write of three arrays."""
    size = _stream_bytes(device)
    weight = nn.Parameter(torch.ones(size // 4, device=device))
    array, weight.grad = weight.detach(), torch.zeros_like(weight)
    adam = torch.optim.Adam([weight], lr=0.0, fused=True)  # its moments are made at the first step

    # Rows of 4 KB one after another, 128 to a sum, as the layer reads them at random.
    table_SV = array.view(-1, 2**10)
    slots_TR = torch.arange(len(table_SV), device=device).view(-1, min(128, len(table_SV)))
    output_TV = torch.empty(len(slots_TR), table_SV.shape[1], device=device)
    reads: dict[str, Call] = {
        f"rows in order, {name}": lambda kernel=kernel: kernel(table_SV, slots_TR, output_TV)  # type: ignore[misc]
        for name, kernel in sum_rows.items()
    }
    reads["torch.sum"] = lambda: array.sum()
    return {
        "read": (reads, float(size)),
        "read and write of three arrays, read of a fourth": ({"fused Adam": adam.step}, 7.0 * size),
    }


def copy(device: torch.device) -> tuple[Call, float]:
    """A copy of a large array, and the bytes that it reads and writes."""
    source = torch.ones(_stream_bytes(device) // 4, device=device)
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source), 2.0 * source.nbytes


def read_in_order(table_SV: Tensor, rows: int) -> Call:
    """So many rows of the table one after another, and again from the first if there are more."""
    whole, rest = divmod(rows, len(table_SV))

    def call() -> None:
        for _ in range(whole):
            table_SV.sum()
        table_SV[:rest].sum()

    return call


def _stream_bytes(device: torch.device) -> int:
    return _STREAM_BYTES * (_TIMES_ON_A_GPU if device.type == "cuda" else 1)


def row_kernels(device: torch.device) -> tuple[dict[str, SumRows], dict[str, UpdateRows]]:
    """Ways to sum random rows without weights, and ways to read and write rows of three tables.

    The fastest plain ways that we know; with Numba, one to eight rows at a time. On a GPU torch has none that reads and
    writes rows in one pass.
    """
    if device.type == "cpu" and importlib.util.find_spec("numba") is not None:
        return _numba_kernels()
    sums: dict[str, SumRows] = {
        "embedding_bag": lambda table_SV, slots_TR, _: F.embedding_bag(slots_TR, table_SV, mode="sum")
    }
    return sums, {} if device.type == "cuda" else {"index_add": _index_add}


def _index_add(first_SV: Tensor, second_SV: Tensor, third_SV: Tensor, slots_R: Tensor) -> None:
    for chunk_C in slots_R.split(2**14):
        for table_SV in (first_SV, second_SV, third_SV):
            table_SV[chunk_C] = table_SV[chunk_C] + 1e-3


def _numba_kernels() -> tuple[dict[str, SumRows], dict[str, UpdateRows]]:
    import numba  # slow to import
    import numpy as np
    from numba import njit, prange

    small = np.float32(1e-6)  # a Python number would make it float64 arithmetic
    plain = njit(parallel=True, fastmath=True)

    @plain
    def sum_by_1(table, slots, output):
        for t in prange(slots.shape[0]):
            total = output[t]
            total[:] = 0
            for r in range(slots.shape[1]):
                a = table[slots[t, r]]
                for v in range(table.shape[1]):
                    total[v] += a[v]

    @plain
    def sum_by_4(table, slots, output):
        for t in prange(slots.shape[0]):
            total = output[t]
            total[:] = 0
            whole = slots.shape[1] // 4 * 4
            for r in range(0, whole, 4):
                a, b = table[slots[t, r]], table[slots[t, r + 1]]
                c, d = table[slots[t, r + 2]], table[slots[t, r + 3]]
                for v in range(table.shape[1]):
                    total[v] += (a[v] + b[v]) + (c[v] + d[v])
            for r in range(whole, slots.shape[1]):
                a = table[slots[t, r]]
                for v in range(table.shape[1]):
                    total[v] += a[v]

    @plain
    def sum_by_8(table, slots, output):
        for t in prange(slots.shape[0]):
            total = output[t]
            total[:] = 0
            whole = slots.shape[1] // 8 * 8
            for r in range(0, whole, 8):
                a, b = table[slots[t, r]], table[slots[t, r + 1]]
                c, d = table[slots[t, r + 2]], table[slots[t, r + 3]]
                e, f = table[slots[t, r + 4]], table[slots[t, r + 5]]
                g, h = table[slots[t, r + 6]], table[slots[t, r + 7]]
                for v in range(table.shape[1]):
                    total[v] += ((a[v] + b[v]) + (c[v] + d[v])) + ((e[v] + f[v]) + (g[v] + h[v]))
            for r in range(whole, slots.shape[1]):
                a = table[slots[t, r]]
                for v in range(table.shape[1]):
                    total[v] += a[v]

    @plain
    def update(first, second, third, slots):
        for r in prange(slots.shape[0]):
            a, b, c = first[slots[r]], second[slots[r]], third[slots[r]]
            for v in range(first.shape[1]):
                b[v] += small
                c[v] += small
                a[v] -= b[v] * c[v]

    def with_our_threads(kernel: Callable[..., object]) -> Callable[..., object]:
        most = numba.get_num_threads()

        def call(*tensors: Tensor) -> object:
            before = numba.get_num_threads()
            numba.set_num_threads(min(torch.get_num_threads(), most))
            try:
                return kernel(*(tensor.detach().numpy() for tensor in tensors))
            finally:
                numba.set_num_threads(before)

        return call

    sums = {"one row": sum_by_1, "four rows": sum_by_4, "eight rows": sum_by_8}
    return (
        {f"Numba, {name} at a time": with_our_threads(kernel) for name, kernel in sums.items()},
        {"Numba": with_our_threads(update)},
    )
