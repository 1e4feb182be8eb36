"""What this package's operations allocate, for `LiveBytes`, to which each is one step.

Letters: T tokens, H heads, Q query width of a head, K rows a token, S slots, V width, N sub-keys a codebook, M entries
(slot, weight, token) of all parts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.lm.footprint.live_bytes import LiveBytes
from memlayers.ops import cpu, gpu
from memlayers.ops.read import dot_reference, read_reference
from memlayers.ops.row_step import Step, adam, step_
from memlayers.ops.row_sum import Part, dense_sum
from memlayers.ops.search import search_backward_reference, search_reference
from memlayers.values import ValueTable, value_tables

_SEARCH_BLOCK = 8 * 2**20  # bytes of half scores that the kernel of a CPU holds at once
_ENTRY = 28  # bytes of an entry in the kernel that sorts them: two arrays of keys, a weight, an address

# Half scores, or gradients of half scores, that are held at once on a GPU, for at least so many queries.
_GPU_BLOCK, _GPU_FEWEST_ROWS = 2**25, 4096
# Bytes of an entry there: key, token and weight as recorded and in order, the order; the sort has as much of its own.
_GPU_ENTRY = 4 + 4 + 4 + 8 + 4 + 4 + 2 * (4 + 8)
_GPU_ASIDE = 4096  # blocks of entries at most, each of which may put the sums of two rows aside


class InsideOperations:
    """The operations of a model on a device, and the row gradients that they leave behind.

    The kernels' needs are written down below; where there are none the references are run.

    On fake tensors `record_` does not run, and records nothing. What it would keep is kept here, and merged as
    `memlayers.ops.row_gradient.RowGradient` does.
    """

    def __init__(self, model: nn.Module, device: str):
        self._tables = [table for table in value_tables(model) if table.row_gradient is not None]
        self._parts: dict[ValueTable, list[Part]] = {table: [] for table in self._tables}
        self._merged: set[ValueTable] = set()
        kernels = {"cpu": self._cpu_kernels, "cuda": self._gpu_kernels}
        has_kernels = {"cpu": cpu, "cuda": gpu}[device].why_not() is None
        self.live = LiveBytes({"record_": self._record} | (kernels[device]() if has_kernels else self._references()))

    # Row gradients.

    @property
    def row_gradients(self) -> list[Tensor]:
        """All tensors that are recorded."""
        return [factor for parts in self._parts.values() for part in parts for factor in part]

    def repeat_parts(self, times: int) -> None:
        """Record so many times more what is recorded."""
        for table, parts in self._parts.items():
            recorded = list(parts)
            for _ in range(times):
                for part in recorded:
                    self._add(table, Part(*(factor.clone() for factor in part)))

    def hand_over(self) -> None:
        """Give one entry's gradient to each table that has more here, so that its row optimizer's step runs."""
        for table, parts in self._parts.items():
            if parts and table.row_gradient is not None:
                slots_TK, weights_TK, grad_TV = parts[-1]
                table.row_gradient.add(slots_TK[:1, :1].clone(), weights_TK[:1, :1].clone(), grad_TV[:1].clone())

    def _record(self, handle: Tensor, slots_TK: Tensor, weights_TK: Tensor, grad_TV: Tensor) -> None:
        (table,) = (table for table in self._tables if table.row_gradient and table.row_gradient.handle is handle)
        self._add(table, Part(slots_TK.clone(), weights_TK.clone(), grad_TV.clone()))

    def _add(self, table: ValueTable, part: Part) -> None:
        parts = self._parts[table]
        parts.append(part)
        factors = parts[1:] if table in self._merged else parts
        num_slots, width = table.weight.shape
        if sum(factor.size for factor in factors) <= num_slots * width:
            return
        self.live.without_data(dense_sum, factors, num_slots)
        grad_SV = table.weight.new_empty(num_slots, width, dtype=part.grad_TV.dtype)
        slots_S1 = torch.arange(num_slots)[:, None]
        self._parts[table] = [Part(slots_S1, grad_SV.new_empty(num_slots, 1), grad_SV)]
        self._merged.add(table)

    # The kernels of a CPU, and of a GPU.

    def _cpu_kernels(self) -> dict[str, Callable[..., None]]:
        return {
            "search": _search_kernel,
            "search_backward": _search_backward_kernel,
            "sum_rows": lambda slots_TK, *_: _scratch(_ENTRY * slots_TK.numel()),
            "row_adam_": lambda weight_SV, *_, **__: _scratch(_ENTRY * self._entries(weight_SV)),
        }

    def _gpu_kernels(self) -> dict[str, Callable[..., None]]:
        return {
            "search": _gpu_search_kernel,
            "search_backward": _gpu_search_backward_kernel,
            "sum_rows": lambda slots_TK, weights_TK, outputs_TV, _: _gpu_rows_kernel(
                slots_TK.numel(), outputs_TV.shape[1]
            ),
            "row_adam_": lambda weight_SV, *_, **__: _gpu_rows_kernel(self._entries(weight_SV), weight_SV.shape[1]),
        }

    def _entries(self, weight_SV: Tensor) -> int:
        (parts,) = (parts for table, parts in self._parts.items() if table.weight is weight_SV)
        return sum(part.slots_TK.numel() for part in parts)

    # The references.

    def _references(self) -> dict[str, Callable[..., None]]:
        def by(reference: Callable[..., Any]) -> Callable[..., None]:
            return lambda *args, **kwargs: self.live.without_data(reference, *args)

        return {
            "search": by(search_reference),
            "search_backward": by(search_backward_reference),
            "read": by(read_reference),
            "read_row_mode": by(lambda *args: read_reference(*args[:3])),
            "dot": by(dot_reference),
            "sum_rows": by(lambda *args: dense_sum([Part(*args[:3])], args[3])),
            "row_adam_": self._row_adam_reference,
        }

    def _row_adam_reference(self, weight_SV: Tensor, *args: Any, **kwargs: Any) -> None:
        (parts,) = (parts for table, parts in self._parts.items() if table.weight is weight_SV)

        def step(weight_SV: Tensor, states: list[Tensor], factors: Any) -> None:
            settings = {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "eps": 1.0}
            step_(Step(adam, weight_SV, tuple(states), [Part(*part) for part in factors], None, -1, settings))

        self.live.without_data(step, weight_SV, list(args[:3]), [list(part) for part in parts])


def _scratch(size: int) -> None:
    torch.empty(size, dtype=torch.uint8)


def _search_kernel(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> None:
    num_tokens, heads, _ = query_THQ.shape
    halves = 8 * heads * weight_2HNC.shape[2]  # bytes of a token's half scores
    size = halves * max(1, min(num_tokens, _SEARCH_BLOCK // halves))
    if query_THQ.dtype != torch.float32:  # may be widened
        size += 4 * (query_THQ.numel() + weight_2HNC.numel())
    _scratch(size)


def _search_backward_kernel(
    grad_THK: Tensor, slots_THK: Tensor, query_THQ: Tensor, weight_2HNC: Tensor, *_: bool
) -> None:
    num_tokens, heads, topk = grad_THK.shape
    size = 2 * heads * num_tokens * (4 + 8 * topk)
    if query_THQ.dtype != torch.float32:  # widened, and so are their gradients at first
        size += 8 * (query_THQ.numel() + weight_2HNC.numel())
    _scratch(size)


def _gpu_search_kernel(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> None:
    _scratch(4 * _gpu_block(query_THQ, weight_2HNC))


def _gpu_search_backward_kernel(
    grad_THK: Tensor, slots_THK: Tensor, query_THQ: Tensor, weight_2HNC: Tensor, *_: bool
) -> None:
    # The gradients of half scores; those of the keys in float32, and of one half once more, as a block makes them.
    _scratch(weight_2HNC.element_size() * _gpu_block(query_THQ, weight_2HNC) + 6 * weight_2HNC.numel())


def _gpu_block(query_THQ: Tensor, weight_2HNC: Tensor) -> int:
    """Half scores of a block of tokens."""
    heads = query_THQ.shape[1]
    halves = 2 * heads * weight_2HNC.shape[2]
    return halves * min(len(query_THQ), max(_GPU_BLOCK // halves, -(-_GPU_FEWEST_ROWS // heads)))


def _gpu_rows_kernel(entries: int, width: int) -> None:
    _scratch(_GPU_ENTRY * entries + 8 * width * min(_GPU_ASIDE, entries // 32 + 1))
