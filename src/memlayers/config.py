"""MemoryConfig: everything that describes one memory layer, and nothing about where it goes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memlayers.checks import check_settings, instead, setting

QueryNorm = Literal["batch", "rms", "none"]
KeyKind = Literal["product", "flat"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """One memory layer (paper, section 3). Raises `ValueError` naming the field, its value and what is allowed.

    The number of slots is always ``num_subkeys ** 2``, for product and for flat keys, so that the two compare.
    """

    dim: int = setting(..., "D, width of the model", least=1)
    value_dim: int | None = setting(
        None, "V, width of a value; None: as wide as the model, without an output projection", least=1
    )
    heads: int = setting(4, "H, each with its own query and its own keys", least=1)
    topk: int = setting(32, "K, slots read per head", least=1)
    num_subkeys: int = setting(512, "N, sub-keys per codebook; the table has N * N slots", least=2)
    query_dim: int = setting(512, "Q, width of the query of one head; even for product keys", least=2)
    query_hidden: tuple[int, ...] = setting((), "hidden sizes of the query network; empty: one linear map", least=1)
    query_norm: QueryNorm = setting("batch", 'over the H * Q query features ("batch"), over Q ("rms"), or none')
    query_bias: bool = setting(True, "bias of the query network's linear maps")
    keys: KeyKind = setting("product", '"product": exact search in O(N); "flat": N * N keys, all searched')
    input_dropout: float = setting(0.0, "on the input of the query network", least=0, below=1)
    query_dropout: float = setting(0.0, "on the query, after its norm", least=0, below=1)
    value_dropout: float = setting(0.0, "on what was read from the table", least=0, below=1)
    value_std: float | None = setting(
        None,
        "standard deviation of fresh values; None: 1/sqrt(V), as in the paper; 0: they say nothing at first",
        least=0,
    )

    def __post_init__(self) -> None:
        check_settings(self)
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
