"""columns: value tables of which each rank owns some columns of all rows, and of their moments.

No gradient of such a table crosses the wire, its row step is local, and memory is divided by the number of ranks. In a
forward pass all ranks gather the slots and weights of all tokens, each reads its own columns for all of them, and what
was read goes back to the ranks whose tokens they are. Backward is the mirror: the gradient of the output goes to the
ranks of the columns, which record it as a row gradient, and the parts of the weights' gradients come back and are
summed in the order of ranks. A row gradient is that of the tokens of all ranks; the step takes the mean over ranks, as
`DistributedDataParallel` does.

A weight in columns is a `DTensor`, `[Shard(1)]`, and on a mesh of two dimensions `[Replicate(), Shard(1)]`: columns
along the last one, replicas of them along the first, which exchange row gradients as replicas of whole tables do.

Letters: T tokens of this rank, N tokens of all ranks, M rows a token reads, S slots, V width, C columns of this rank.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from memlayers.distributed.agreement import Ranks, is_alone, own_part
from memlayers.distributed.exchange import Held, as_bytes, cut, in_order, index_dtype
from memlayers.distributed.wrapping import keep_out_of_ddp
from memlayers.ops.read import dot, read
from memlayers.ops.row_gradient import RowGradient, record_
from memlayers.torch_private import is_exporting
from memlayers.values import ValueTable, computed_eagerly, value_tables

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

# Elements of whole rows that are made, sent or read at a time: 16 MB in float32.
CHUNK_ELEMENTS = 2**22


def shard_tables(model: nn.Module, mesh: "DeviceMesh") -> nn.Module:
    """Leaves of each value table of the model the columns that this rank owns; returns the model.

    Call it on all ranks, before the optimizer is built and the model is wrapped. From then on every rank takes part in
    each forward pass through a table, also without gradients, and in each backward pass, if with no token. The weight
    of a table becomes a `DTensor`; it is trained by a row optimizer alone.

    A table on the meta device gets fresh rows, made a few at a time: then no whole table is ever made.

    Args:
        model: with memories, or a value table.
        mesh: of one dimension, or of two: replicas along the first, columns along the second.

    Raises:
        ValueError: another mesh, or more ranks than columns; no table, one of `memlayers.Experts`, one that has a row
            optimizer or is in columns already, or one that FSDP has taken; a model that is wrapped in
            `DistributedDataParallel`. No table is changed then.
    """
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must have 1 or 2 dimensions (replicas, columns), got {mesh.ndim}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("model must not be wrapped in DistributedDataParallel yet: shard_tables comes first")
    if not (tables := value_tables(model)):
        raise ValueError("model must have at least one value table, got none")
    fresh = put_in_columns(tables, mesh)
    for table in fresh:
        table.reset_parameters()
    keep_out_of_ddp(model)
    return model


def put_in_columns(tables: list[ValueTable], mesh: "DeviceMesh") -> list[ValueTable]:
    """`shard_tables` of some tables, but for fresh rows: returns those whose columns nobody has filled yet."""
    for table in tables:
        _check(table, mesh)
    fresh = [table for table in tables if table.weight.is_meta]
    for table in tables:
        _leave_columns(table, mesh)
    return fresh


def _check(table: ValueTable, mesh: "DeviceMesh") -> None:
    if isinstance(table, ColumnTable):
        raise ValueError("value tables must be whole, got one in columns: shard_tables is called once")
    if type(table) is not ValueTable:
        raise ValueError(
            f"value tables in columns must be plain ones, got {type(table).__name__}: keep these as replicas, without "
            "shard_tables"
        )
    if table.row_gradient is not None:
        raise ValueError("value tables must have no row optimizer yet: build it after shard_tables")
    if hasattr(table.weight, "placements"):
        raise ValueError(
            "value tables must be whole, got a DTensor: call shard_tables before fully_shard, and keep that from "
            "sharding them (fully_shard(..., ignored_params={table.weight, table.row_mark}))"
        )
    width, size = table.weight.shape[1], mesh.size(mesh.ndim - 1)
    if len(bounds(width, size)) < size:
        raise ValueError(f"a table of width {width} cannot be divided among {size} ranks: use a smaller mesh")


def bounds(width: int, size: int) -> list[tuple[int, int]]:
    """First column of each rank and the one behind its last, as `Shard(1)` has them."""
    most = -(-width // size)
    return [(first, min(width, first + most)) for first in range(0, width, most)]


def own_bounds(width: int, mesh: "DeviceMesh") -> tuple[int, int]:
    """Those of this rank."""
    return bounds(width, mesh.size(mesh.ndim - 1))[mesh.get_local_rank(mesh.ndim - 1)]


_MEETINGS = ("a forward pass", "a pass without gradients", "a save")


def meet(ranks: Ranks, where: str, number: int = 0) -> list[int]:
    """A number of each rank, where all of them are at the same place.

    Raises `RuntimeError` on all of them otherwise: what one sends would be taken for something else.
    """
    said = ranks.gather_numbers([_MEETINGS.index(where), number])
    if len({place for place, _ in said}) > 1:
        places = ", ".join(f"rank {rank} in {_MEETINGS[place]}" for rank, (place, _) in enumerate(said))
        raise RuntimeError(
            "all ranks must take part in each pass through a table in columns, also without gradients or tokens, and "
            f"in each save of it, got {places}"
        )
    return [number for _, number in said]


def columns_of(tensor: Any, weight: Any) -> Tensor:
    """Of a whole tensor of the shape of a weight in columns, those of this rank, as a `DTensor`; others as they are.

    Raises `ValueError` for columns that are not divided as the weight is.
    """
    parts = [1 if not hasattr(one, "placements") else one.device_mesh.size() for one in (tensor, weight)]
    if parts[0] not in (1, parts[1]):
        raise ValueError(
            f"states of tables must be whole, or in columns of as many ranks as the table, {parts[1]}, got {parts[0]}: "
            "a checkpoint of torch.distributed.checkpoint is read by any number of them"
        )
    if not hasattr(weight, "placements") or hasattr(tensor, "placements") or tensor.shape != weight.shape:
        return tensor
    first, last = own_bounds(weight.shape[1], weight.device_mesh)
    return _columns(tensor[:, first:last].contiguous(), weight.shape, weight.device_mesh)


@torch.no_grad()
def _leave_columns(table: ValueTable, mesh: "DeviceMesh") -> None:
    weight_SV = table.weight
    first, last = own_bounds(weight_SV.shape[1], mesh)
    if weight_SV.is_meta:
        columns_SC = torch.empty(len(weight_SV), last - first, dtype=weight_SV.dtype, device=mesh.device_type)
    else:
        columns_SC = weight_SV[:, first:last].clone(memory_format=torch.contiguous_format)
    table.__class__ = ColumnTable
    table.weight = nn.Parameter(_columns(columns_SC, weight_SV.shape, mesh), weight_SV.requires_grad)
    table.settle_mark()


def _columns(columns_SC: Tensor, shape: torch.Size, mesh: "DeviceMesh") -> Tensor:
    # Here: its import takes a second.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(1)]
    return DTensor.from_local(columns_SC, mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1))


@computed_eagerly
class ColumnTable(ValueTable):
    """A value table in columns; `shard_tables` makes it of a `ValueTable`.

    What each call sends depends on how many tokens the other ranks have, which no graph can know.
    """

    weight: Any

    @property
    def ranks(self) -> Ranks:
        """Those that have the other columns."""
        if is_alone():
            raise RuntimeError(
                "one rank alone cannot read a value table in columns: examine the model (doctor) before shard_tables"
            )
        return Ranks(self.weight.device_mesh.get_group(self.weight.device_mesh.ndim - 1))

    @property
    def replicas(self) -> Ranks | None:
        """Those that have the same columns; None where there are none."""
        mesh = self.weight.device_mesh
        return Ranks(mesh.get_group(0)) if mesh.ndim == 2 and mesh.size(0) > 1 else None

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First column of each rank and the one behind its last."""
        mesh = self.weight.device_mesh
        return bounds(self.weight.shape[1], mesh.size(mesh.ndim - 1))

    @property
    def own_bounds(self) -> tuple[int, int]:
        """Those of this rank."""
        return own_bounds(self.weight.shape[1], self.weight.device_mesh)

    def like_weight(self, columns_SC: Tensor) -> Tensor:
        """A tensor of this rank's columns as one of all columns, as the weight is."""
        return _columns(columns_SC, self.weight.shape, self.weight.device_mesh)

    def make_states(self, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        states = make(own_part(self.weight))
        return {name: self.like_weight(one) if one.ndim == 2 else one for name, one in states.items()}

    def in_order(self, held: Held) -> Held:
        """What this rank has recorded, of all ranks' tokens, in the order of one process with their micro-batches."""
        size = len(self.bounds)
        by_rank = [Held(held.parts[rank::size], held.passes) for rank in range(size)]
        return held if len(held.parts) % size else held._replace(parts=list(in_order(by_rank)))

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm over all columns, from that over this rank's; all ranks ask together."""
        return torch.stack(self.ranks.gather(norm.double().square())).sum().sqrt().to(norm.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As of a whole table, a few rows at a time: with the same seed on all ranks it has the same values."""
        columns_SC, (first, last) = own_part(self.weight), self.own_bounds
        slots, width = self.weight.shape
        rows = max(16, CHUNK_ELEMENTS // width // 16 * 16)  # random numbers come by sixteens
        for start in range(0, slots, rows):
            piece = columns_SC.new_empty(min(rows, slots - start), width).normal_(std=self.std)
            columns_SC[start : start + rows] = piece[:, first:last]

    def own(self, owner: object) -> RowGradient:
        row_gradient = super().own(owner)
        row_gradient.whole_norm = self.whole_norm
        return row_gradient

    def _compute(self, slots_TM: Tensor, given: Tensor) -> Tensor:
        if is_exporting():
            raise ValueError(
                "a value table in columns cannot be exported: load the model in one process, and export it"
            )
        if self.row_gradient is not None and self.weight.requires_grad and torch.is_grad_enabled():
            self._check_row_mode()
        where = "a forward pass" if torch.is_grad_enabled() else "a pass without gradients"
        return _Read.apply(given, self.row_mark, slots_TM, self, where)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict = {**state_dict, name: columns_of(state_dict[name], self.weight)}
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Read(torch.autograd.Function):
    """y [T, V]; the second input, the companion, is there so that backward passes through where weights have none."""

    @staticmethod
    def forward(
        ctx: Any, weights_TM: Tensor, mark_1: Tensor, slots_TM: Tensor, table: ColumnTable, where: str
    ) -> Tensor:
        ranks, columns_SC = table.ranks, own_part(table.weight)
        counts = meet(ranks, where, len(slots_TM))
        slots_NM, weights_NM = _gathered(ranks, slots_TM, weights_TM, counts, index_dtype(table.weight))
        y_NC = read(columns_SC, slots_NM, weights_NM)
        ctx.table, ctx.counts = table, counts
        ctx.save_for_backward(columns_SC, slots_NM, weights_NM)
        return _to_tokens(ranks, y_NC, counts, table.bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        columns_SC, slots_NM, weights_NM = ctx.saved_tensors
        table, counts = ctx.table, ctx.counts
        ranks, log = table.ranks, table.row_gradient
        if log is None and table.weight.requires_grad:
            raise RuntimeError(
                "a value table in columns has no dense gradient: build its row optimizer (MemoryAdamW, RowAdam, "
                "RowAdagrad, RowSGD), or freeze it by table.requires_grad_(False)"
            )
        grad_NC = _to_columns(ranks, grad_TV, counts, table.bounds)
        grad_TM = None
        if ctx.needs_input_grad[0]:
            grad_NM = dot(columns_SC, slots_NM, grad_NC)
            # One after the other: a sum over a dimension may take another order.
            shape = counts[ranks.rank], grad_NM.shape[1]
            grad_TM, *others = ranks.exchange(grad_NM.split(counts), [shape] * ranks.size)
            for other in others:
                grad_TM = grad_TM + other
            grad_TM = grad_TM.to(weights_NM.dtype)
        if table.weight.requires_grad:
            for part in zip(*(factor.split(counts) for factor in (slots_NM, weights_NM, grad_NC)), strict=True):
                record_(log.handle, *part)
        return grad_TM, columns_SC.new_zeros(1) if ctx.needs_input_grad[1] else None, None, None, None


def _gathered(
    ranks: Ranks, slots_TM: Tensor, weights_TM: Tensor, counts: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Slots and weights of all ranks' tokens, by rank."""
    rows = slots_TM.shape[1]
    sent = [as_bytes(slots_TM.to(dtype)), as_bytes(weights_TM)]
    sizes = [sum(-(-count * rows * kind.itemsize // 8) * 8 for kind in (dtype, weights_TM.dtype)) for count in counts]
    slots, weights = [], []
    for data, count in zip(ranks.gather_uneven(torch.cat(sent), sizes), counts, strict=True):
        its_slots, data = cut(data, count * rows, dtype)
        its_weights, _ = cut(data, count * rows, weights_TM.dtype)
        slots.append(its_slots.long().view(count, rows))
        weights.append(its_weights.view(count, rows))
    return torch.cat(slots), torch.cat(weights)


def _to_tokens(ranks: Ranks, y_NC: Tensor, counts: list[int], bounds: list[tuple[int, int]]) -> Tensor:
    """From some columns of all tokens to all columns of this rank's."""
    shapes = [(counts[ranks.rank], width) for width in _widths(bounds)]
    return torch.cat(ranks.exchange(y_NC.split(counts), shapes), 1)


def _to_columns(ranks: Ranks, grad_TV: Tensor, counts: list[int], bounds: list[tuple[int, int]]) -> Tensor:
    """The mirror."""
    widths = _widths(bounds)
    shapes = [(count, widths[ranks.rank]) for count in counts]
    return torch.cat(ranks.exchange(grad_TV.split(widths, 1), shapes))


def _widths(bounds: list[tuple[int, int]]) -> list[int]:
    return [last - first for first, last in bounds]
