"""MemoryConfig: everything that describes one memory layer, and nothing about where it goes."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from memlayers.checks import require_bool, require_choice, require_int, require_number

QueryNorm = Literal["batch", "rms", "none"]
KeyKind = Literal["product", "flat"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """One memory layer (paper, section 3). Raises `ValueError` naming the field, its value and what is allowed.

    The number of slots is always ``num_subkeys ** 2``, for product and for flat keys, so that the two compare.
    """

    dim: int  # D, width of the model
    value_dim: int | None = None  # V, width of a value; None: as wide as the model, without an output projection
    heads: int = 4  # H, each with its own query and its own keys
    topk: int = 32  # K, slots read per head
    num_subkeys: int = 512  # N, sub-keys per codebook; the table has N * N slots
    query_dim: int = 512  # Q, width of the query of one head; even for product keys
    query_hidden: tuple[int, ...] = ()  # hidden sizes of the query network; empty: one linear map
    query_norm: QueryNorm = "batch"  # over the H * Q query features ("batch"), over Q ("rms"), or none
    query_bias: bool = True  # bias of the query network's linear maps
    keys: KeyKind = "product"  # "product": exact search in O(N); "flat": N * N keys, all searched
    input_dropout: float = 0.0  # on the input of the query network
    query_dropout: float = 0.0  # on the query, after its norm
    value_dropout: float = 0.0  # on what was read from the table

    def __post_init__(self) -> None:
        # Lists come from JSON and YAML; a tuple keeps the configuration hashable.
        if isinstance(self.query_hidden, list):
            object.__setattr__(self, "query_hidden", tuple(self.query_hidden))
        for name in ("dim", "heads", "topk", "num_subkeys", "query_dim"):
            require_int(name, getattr(self, name), least=2 if name in ("num_subkeys", "query_dim") else 1)
        if self.value_dim is not None:
            require_int("value_dim", self.value_dim, least=1)
        if not isinstance(self.query_hidden, tuple):
            raise ValueError(f"query_hidden must be a sequence of hidden sizes, got {self.query_hidden!r}")
        for size in self.query_hidden:
            require_int("query_hidden", size, least=1)
        require_choice("query_norm", self.query_norm, get_args(QueryNorm))
        require_choice("keys", self.keys, get_args(KeyKind))
        require_bool("query_bias", self.query_bias)
        for name in ("input_dropout", "query_dropout", "value_dropout"):
            require_number(name, getattr(self, name), least=0.0, below=1.0)
        if self.num_subkeys > 2**16:  # the selection keeps a slot in 32 bits
            raise ValueError(f"num_subkeys must be at most {2**16}, got {self.num_subkeys}")
        most = self.num_subkeys if self.keys == "product" else self.slots
        if self.topk > most:
            what = "num_subkeys" if self.keys == "product" else "num_subkeys ** 2"
            raise ValueError(f"topk must be at most {what} = {most} for {self.keys} keys, got {self.topk}")
        if self.keys == "product" and self.query_dim % 2:
            raise ValueError(f"query_dim must be even for product keys (two halves), got {self.query_dim}")

    @property
    def slots(self) -> int:
        """S, the number of rows of the value table."""
        return self.num_subkeys**2

    @property
    def width(self) -> int:
        """V, the width of a value."""
        return self.dim if self.value_dim is None else self.value_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives an equal configuration back."""
        return {**dataclasses.asdict(self), "query_hidden": list(self.query_hidden)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "MemoryConfig":
        """The inverse of `to_dict`. Raises `ValueError` for an unknown or a missing field."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"a memory configuration must hold fields and their values, got {fields!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"unknown memory configuration field {name!r}; {instead(name, known)}")
        if "dim" not in fields:
            raise ValueError("memory configuration field 'dim' (width of the model) is missing")
        return cls(**fields)


def instead(name: object, known: Collection[str], *, spelled: str = "{!r}") -> str:
    """The end of an error about an unknown name: the known ones that it resembles, else those of its section.

    Names may be dotted. One that lacks its section, or has a wrong one, is known by its last part.
    """
    section, _, last = str(name).rpartition(".")
    parts: dict[str, list[str]] = {}
    siblings: dict[str, str] = {}
    for other in known:
        other_section, _, other_last = other.rpartition(".")
        parts.setdefault(other_last, []).append(other)
        if other_section == section:
            siblings[other_last] = other
    close = [siblings[part] for part in difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)]
    close = close or [
        other for part in difflib.get_close_matches(last, parts, n=1, cutoff=0.8) for other in parts[part]
    ]
    if close:
        return f"did you mean {' or '.join(map(spelled.format, close))}?"
    return f"allowed: {', '.join(siblings.values() or known)}"
