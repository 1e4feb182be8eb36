"""Shapes that are measured: one memory layer and the tokens that go through it."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from memlayers.checks import require_int
from memlayers.config import MemoryConfig

Axis = Literal["slots", "topk", "tokens"]
AXES: tuple[Axis, ...] = ("slots", "topk", "tokens")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer of product keys, and a batch. Raises `ValueError` naming the field, its value and what is allowed."""

    name: str
    dim: int = 1024  # D, width of the model
    value_dim: int = 1024  # V, width of a value
    heads: int = 4  # H
    topk: int = 32  # K, rows read per head
    num_subkeys: int = 512  # N, sub-keys per codebook: N * N slots
    query_dim: int = 512  # Q, width of the query of one head
    tokens: int = 2048  # T, tokens of a batch

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, least=1)
        self.config()

    def config(self) -> MemoryConfig:
        """The layer."""
        return MemoryConfig(**{name: value for name, value in vars(self).items() if name not in ("name", "tokens")})

    @property
    def slots(self) -> int:
        """S, rows of the table."""
        return self.num_subkeys**2

    @property
    def reads(self) -> int:
        """Rows that a batch reads, repeated ones counted."""
        return self.tokens * self.heads * self.topk

    @property
    def table_bytes(self) -> int:
        """Of a float32 table."""
        return 4 * self.slots * self.value_dim

    @property
    def workspace_bytes(self) -> int:
        """A generous bound of what a layer needs beside its table: scores, the textbook's grids, activations."""
        rows = self.tokens * self.heads
        scores = rows * (2 * self.num_subkeys + 6 * self.topk**2 + 4 * self.query_dim)
        weights = self.heads * self.query_dim * (4 * self.dim + 4 * self.num_subkeys)
        return 16 * (scores + self.tokens * (8 * self.dim + self.value_dim)) + 4 * (weights + 8 * self.dim**2)

    def describe(self, varied: Axis | None = None) -> str:
        """The numbers on one line; a dot for the one that is varied."""
        slots = "·" if varied == "slots" else f"{self.num_subkeys}² = {self.slots:,}"
        topk = "·" if varied == "topk" else f"{self.topk}"
        tokens = "·" if varied == "tokens" else f"{self.tokens:,}"
        return (
            f"{slots} slots of width {self.value_dim}, dim {self.dim}, {self.heads} heads x {topk}, "
            f"query width {self.query_dim}, {tokens} token{'' if tokens == '1' else 's'}"
        )


_SHAPES = (
    Shape(name="512x512"),
    Shape(name="1024x1024", num_subkeys=1024),
    Shape(name="2048x2048", num_subkeys=2048, dim=256, value_dim=256),
    # For a quick look, and for the tests.
    Shape(name="128x128", num_subkeys=128, dim=256, value_dim=256, query_dim=128, tokens=512),
    Shape(name="tiny", num_subkeys=16, dim=32, value_dim=32, heads=2, topk=4, query_dim=16, tokens=64),
)
SHAPES = {one.name: one for one in _SHAPES}


def shape(name: str) -> Shape:
    """The shape of that name. Raises `ValueError` for an unknown one."""
    if name not in SHAPES:
        raise ValueError(f"shapes must be among {', '.join(SHAPES)}, got {name!r}")
    return SHAPES[name]


def sweep(axis: Axis, base: Shape) -> list[Shape]:
    """`base` with one number varied: from 512x512, 16k to 4M slots, 8 to 128 rows a head, 1 to 8,192 tokens."""
    field, values = {
        "slots": ("num_subkeys", [base.num_subkeys * 2**power // 4 for power in range(5)]),
        "topk": ("topk", [base.topk * 2**power // 4 for power in range(5)]),
        "tokens": ("tokens", [1, *(base.tokens * 4 // part for part in (1024, 128, 16, 4, 1))]),
    }[axis]
    values = sorted({value for value in values if value >= (base.topk if axis == "slots" else 1)})
    if axis == "topk":
        values = [value for value in values if value <= base.num_subkeys]
    return [dataclasses.replace(base, name=f"{base.name}, {value:,} {field}", **{field: value}) for value in values]


def axis_value(axis: Axis, of: Shape) -> int:
    """Where a shape stands in a sweep."""
    value: int = getattr(of, axis)
    return value
