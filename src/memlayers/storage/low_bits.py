"""LowBitTable: a value table of 8 or 4 bits a number, for inference.

Letters: T tokens, S slots, V value width, M rows a token reads, R bytes of codes of a row.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.checks import require_int
from memlayers.experts import ExpertTable, InputTable
from memlayers.ops import exported
from memlayers.ops.low_bits import code_bytes, dequantised, dot_low_bits, quantised, read_low_bits
from memlayers.torch_private import is_exporting
from memlayers.values import Companion, ValueTable

ROWS = 2**14  # that are rounded at a time

_REMEDY = "train the model with its table of floats, and quantise it afterwards"


class LowBitTable(ValueTable):
    """A value table whose rows are integers of 8 or 4 bits, each row with a scale: a quarter or an eighth of float32.

    `memlayers.quantize_memory` makes it of a table of floats. It is read as that one is; nobody trains it, while
    gradients of the weights of a read, and so of queries and keys, are those of the rounded rows. It holds two
    buffers of bytes, which `to(dtype)` leaves alone: ``codes`` [S, R] (`memlayers.ops.low_bits` says what they are)
    and ``scales`` [S, 4], a float32 each.

    Args:
        slots: S, the number of rows.
        dim: V, the width of a row.
        bits: 8 or 4.
        device: of the rows. They are zero until they are filled.

    Raises:
        ValueError: a size below 1; other bits.
    """

    def __init__(self, slots: int, dim: int, bits: int, *, device: torch.device | str | None = None):
        nn.Module.__init__(self)
        require_int("slots", slots, least=1)
        require_int("dim", dim, least=1)
        self.bits, self._shape = bits, torch.Size((slots, dim))
        where: Any = {"dtype": torch.uint8, "device": device}
        self.register_buffer("codes", torch.zeros(slots, code_bytes(dim, bits), **where))
        self.register_buffer("scales", torch.zeros(slots, 4, **where))
        self.companion = Companion(self.codes.device, torch.float32, requires_grad=False)
        self.row_gradient = None

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales

    @property
    def untrainable(self) -> str:
        return f"tables must be of floats to be trained, got one of {self.bits} bits: {_REMEDY}"

    @property
    def float_scales(self) -> Tensor:
        """The scales [S]."""
        return self.scales.view(torch.float32)[:, 0]

    def operands(self) -> tuple[Any, ...] | None:
        return (self.codes, self.float_scales, self.bits, self.shape[1]) if type(self) is LowBitTable else None

    def dequantised(self, slots: Tensor) -> Tensor:
        """The numbers [..., V] (float32) of the rows of slots [...]."""
        return dequantised(self.codes[slots], self.float_scales[slots], self.shape[1], self.bits)

    @torch.no_grad()
    def fill(self, start: int, rows: Tensor) -> None:
        """Rounds rows [n, V] of floats into the table, from slot `start` on. Raises as `memlayers.ops.quantised`."""
        codes, scales = quantised(rows, self.bits)
        part = slice(start, start + len(rows))
        self.codes[part].copy_(codes)
        self.scales[part].copy_(scales[:, None].view(torch.uint8))

    def reset_parameters(self) -> None:
        """All rows are zero: what was never filled adds nothing."""
        self.codes.zero_()
        self.scales.zero_()

    def _compute(self, slots_TM: Tensor, given: Tensor) -> Tensor:
        operation = exported.read_low_bits if is_exporting() else read_low_bits
        return operation(self.codes, self.float_scales, slots_TM, given, self.shape[1], self.bits)

    def settle_mark(self) -> None:
        mark, where = self.row_mark, self.codes.device
        if not self.codes.is_meta and mark.device != where:
            self.companion._parameters["row_mark"] = nn.Parameter(torch.zeros(1, device=where), requires_grad=False)

    def extra_repr(self) -> str:
        slots, dim = self.shape
        return f"slots={slots}, dim={dim}, bits={self.bits}"

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if f"{prefix}weight" in state_dict:
            errors.append(
                f"{prefix}weight is a table of floats, and this one has {self.bits} bits: load it into the model of "
                f"floats, and quantise that (quantize_memory)"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"a value table of {self.bits} bits has no weight of floats: read its rows by `read` or "
                f"`dequantised(slots)`; to train, {_REMEDY}"
            )
        return super().__getattr__(name)


class LowBitInputTable(LowBitTable):
    """An `InputTable` of 8 or 4 bits: its rows are multiplied with an input."""

    def forward(self, slots: Tensor, inputs: Tensor) -> Tensor:
        return InputTable.forward(self, slots, inputs)  # type: ignore[arg-type]

    def _compute(self, slots_TM: Tensor, given: Tensor) -> Tensor:
        operation = exported.dot_low_bits if is_exporting() else dot_low_bits
        return operation(self.codes, self.float_scales, slots_TM, given, self.bits)


class LowBitExpertTable(LowBitTable):
    """An `ExpertTable` of 8 or 4 bits, with its ``inputs``."""

    def __init__(self, slots: int, dim: int, input_dim: int, bits: int, *, device: torch.device | str | None = None):
        super().__init__(slots, dim, bits, device=device)
        self.inputs = LowBitInputTable(slots, input_dim, bits, device=device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.inputs.reset_parameters()


def empty_like(table: ValueTable, bits: int, *, device: torch.device | str | None = None) -> LowBitTable:
    """A table of `bits` of the shape of a table of floats, without its rows.

    Raises `ValueError` for a class that is not known, and for other bits.
    """
    slots, dim = table.shape
    if type(table) is ValueTable:
        return LowBitTable(slots, dim, bits, device=device)
    if isinstance(table, ExpertTable) and type(table) is ExpertTable:
        return LowBitExpertTable(slots, dim, table.inputs.shape[1], bits, device=device)
    if isinstance(table, LowBitTable):
        raise ValueError(f"tables must be of floats to be quantised, got one of {table.bits} bits")
    raise ValueError(
        f"tables must be whole and in memory to be quantised (ValueTable, ExpertTable), got {type(table).__name__}: "
        f"save the model, and load it as save_memory and load_memory do by default"
    )


def unlisted_numbers(tables: Iterable[ValueTable]) -> int:
    """How many numbers tables hold that are in no list of parameters: of few bits, or in a file."""
    return sum(table.shape.numel() for table in tables if "weight" not in table._parameters)


def low_bit_table(table: ValueTable, bits: int) -> LowBitTable:
    """A table of floats, rounded to the nearest rows of `bits`; on its device.

    Raises `ValueError` as `empty_like`, for one that a row optimizer trains, and for numbers that are not finite.
    """
    made = empty_like(table, bits, device=table.row_mark.device)
    pairs: list[tuple[LowBitTable, ValueTable]] = [(made, table)]
    if isinstance(made, LowBitExpertTable) and isinstance(table, ExpertTable):
        pairs.append((made.inputs, table.inputs))
    for low, of_floats in pairs:
        if of_floats.row_gradient is not None and of_floats.row_gradient.owner() is not None:
            raise ValueError("tables must have no row optimizer to be quantised, got one: call its release() first")
        for start in range(0, low.shape[0], ROWS):
            low.fill(start, of_floats.weight[start : start + ROWS])
    return made.train(table.training)
