"""HostTable: a value table in the memory of the host, of a model on a GPU; HostMemory: the place of one.

Letters: T tokens, S slots, V value width, M rows a token reads, U different slots.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memlayers.ops.read import dot, read, sum_rows
from memlayers.ops.row_gradient import record_
from memlayers.torch_private import is_exporting
from memlayers.values import TablePlace, ValueTable, computed_eagerly

_PIECE = 2**25  # bytes of rows that are copied at a time


class HostMemory(TablePlace):
    """The memory of the host as the place of a value table, for a model on a GPU that has no room for it.

        model = add_memory(model.to("cuda"), config, values=HostMemory())

    `HostTable` says what goes where.
    """

    def make_table(self, slots: int, dim: int, **options: Any) -> "HostTable":
        return HostTable(slots, dim, **options)

    def below(self, name: str) -> "HostMemory":
        return self

    def __repr__(self) -> str:
        return "HostMemory()"


@computed_eagerly
class HostTable(ValueTable):
    """A `ValueTable` that stays in the memory of the host, wherever the model goes.

    A call on a GPU copies the different rows that it reads there, each once, through buffers that are pinned; they stay
    on the GPU until their backward pass. That pass copies slots, weights and the gradient of the output back, and
    records them on the host, where a row optimizer keeps its states and makes its step by the kernels of a CPU. Both
    passes wait for the device. Without a row optimizer the table has an ordinary dense gradient, on the host. A call on
    the host is that of any table.

    Args:
        slots: as of `ValueTable`, and so are ``dim``, ``dtype`` and ``std``.
        device: of the model. The rows are on the host, but where it is the meta device, which has none.

    Raises:
        ValueError: as `ValueTable` does.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        std: float | None = None,
    ):
        super().__init__(slots, dim, device=_kept_on(torch.empty(0, device=device).device), dtype=dtype, std=std)

    def _compute(self, slots_TM: Tensor, given: Tensor) -> Tensor:
        weight_SV = self.weight
        if is_beside(weight_SV, slots_TM):
            return super()._compute(slots_TM, given)
        if is_exporting():
            raise ValueError("a value table on the host cannot be exported from a GPU: move the model to the CPU first")
        if not torch.is_grad_enabled():
            return read(*copied_rows(weight_SV, slots_TM), given)
        handle = None
        if self.row_gradient is not None and weight_SV.requires_grad and self._is_owned():
            self._check_row_mode()
            handle = self.row_gradient.handle
        self.settle_mark()
        return _Read.apply(given, weight_SV, self.row_mark, slots_TM, handle)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostTable":
        def stay(tensor: Tensor) -> Tensor:
            like = fn(tensor.new_empty(0))  # of what it would become; the table itself never goes to a GPU
            if _kept_on(like.device) == like.device:
                return fn(tensor)
            return torch.empty_like(tensor, dtype=like.dtype, device="cpu") if tensor.is_meta else tensor.to(like.dtype)

        super()._apply(stay, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, on the host"


def put_on_host(table: ValueTable) -> None:
    """Makes a table without storage, on the meta device, one on the host, whose rows are yet to be filled.

    Raises `ValueError` for a table of another class.
    """
    if type(table) is not ValueTable:
        raise ValueError(
            f"values must be 'memory' for memories with a {type(table).__name__}, got 'host': only plain tables of "
            f"floats stay on the host"
        )
    table.__class__ = HostTable
    table.weight = nn.Parameter(torch.empty_like(table.weight, device="cpu"), table.weight.requires_grad)


def is_beside(weight_SV: Tensor, slots_TM: Tensor) -> bool:
    """Whether a call is made where the table is, so that no row needs to be copied."""
    return weight_SV.device == slots_TM.device


def _kept_on(device: torch.device) -> torch.device:
    """Where a table is that is asked for on a device."""
    return device if device.type == "meta" else torch.device("cpu")


def copied_rows(weight_SV: Tensor, slots_TM: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows [U, V] of slots, on the device of these, and the places [T, M] of the slots among them.

    Raises `IndexError` for what is no slot.
    """
    slots_U, places_TM = slots_TM.unique(return_inverse=True)
    slots_U = slots_U.cpu()  # waits for the device
    num_slots, width = weight_SV.shape
    if len(slots_U) and not 0 <= slots_U[0] <= slots_U[-1] < num_slots:
        raise IndexError(f"slots must be in [0, {num_slots}), got {int(slots_U[0])} to {int(slots_U[-1])}")
    rows_UV = torch.empty(len(slots_U), width, dtype=weight_SV.dtype, device=slots_TM.device)
    size = max(1, _PIECE // (width * weight_SV.itemsize))
    for target, slots in zip(rows_UV.split(size), slots_U.split(size), strict=True):
        # A new buffer each time: PyTorch gives one that was pinned out again when its copy is over, not before.
        buffer = torch.empty(target.shape, dtype=target.dtype, pin_memory=target.is_cuda)
        torch.index_select(weight_SV.detach(), 0, slots, out=buffer)
        target.copy_(buffer, non_blocking=True)
    return rows_UV, places_TM


class _Read(torch.autograd.Function):
    """y [T, V]. The handle is that of the table's `RowGradient`, or None: then the gradient of the table is dense."""

    @staticmethod
    def forward(
        ctx: Any, given_TM: Tensor, weight_SV: Tensor, mark_1: Tensor, slots_TM: Tensor, handle: Tensor | None
    ) -> Tensor:
        rows_UV, places_TM = copied_rows(weight_SV, slots_TM)
        ctx.save_for_backward(rows_UV, places_TM, slots_TM, given_TM)
        ctx.num_slots, ctx.handle = len(weight_SV), handle
        return read(rows_UV, places_TM, given_TM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows_UV, places_TM, slots_TM, given_TM = ctx.saved_tensors
        of_given, of_weight, of_mark, _, _ = ctx.needs_input_grad
        grad_TM = dot(rows_UV, places_TM, grad_TV).to(given_TM.dtype) if of_given else None
        grad_SV = None
        if of_weight:
            factors = [one.cpu() for one in (slots_TM, given_TM, grad_TV)]
            if ctx.handle is not None:
                record_(ctx.handle, *factors)
            else:
                grad_SV = sum_rows(*factors, ctx.num_slots).to(rows_UV.dtype)
        return grad_TM, grad_SV, torch.zeros(1, dtype=rows_UV.dtype) if of_mark else None, None, None
