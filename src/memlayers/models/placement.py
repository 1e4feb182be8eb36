"""MemoryPlacement: which modules of a model carry a memory, of which kind, and whether they share one table of values.

`MemoryConfig` says what a memory is and nothing about where it goes; the two are saved together, under ``memory`` in a
model's ``config.json`` and alone in ``memory_config.json``.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from memlayers.checks import require_bool, require_choice
from memlayers.config import MemoryConfig
from memlayers.ops.low_bits import BITS

Mode = Literal["replace", "parallel"]

_KEYS = ("config", "kind", "layers", "mode", "share_values")


@dataclass(frozen=True, kw_only=True)
class MemoryPlacement:
    """A memory configuration and where it goes. Raises `ValueError` naming the field, its value and what is allowed."""

    config: MemoryConfig  # what each memory is
    kind: str = "MemoryLayer"  # the name of its class
    layers: Sequence[int] | Sequence[str]  # blocks counted from 1 as in the paper, ascending; or names of modules
    mode: Mode = "replace"  # "replace": in place of the module; "parallel": beside it, behind a gate
    share_values: bool = False  # one table of values for all of them (queries and keys stay their own)
    value_bits: int | None = None  # of a number of the tables, 8 or 4; None: floats

    def __post_init__(self) -> None:
        if not isinstance(self.config, MemoryConfig):
            raise ValueError(f"config must be a MemoryConfig, got {self.config!r}")
        if not isinstance(self.kind, str) or not self.kind:
            raise ValueError(f"kind must be the name of a class of memory layers, got {self.kind!r}")
        layers = self.layers
        if isinstance(layers, str | bytes) or not isinstance(layers, Sequence) or not layers:
            raise ValueError(
                f"layers must be a non-empty list of block numbers, counted from 1, or of names of modules, "
                f"got {layers!r}"
            )
        if all(isinstance(layer, str) for layer in layers):
            if "" in layers:
                raise ValueError("layers must be names of modules inside of the model, got ''")
            object.__setattr__(self, "layers", tuple(layers))
        else:
            for layer in layers:
                if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
                    raise ValueError(
                        f"layers must be integers of at least 1 (blocks are counted from 1), or all names of modules, "
                        f"got {layer!r}"
                    )
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers must not name a module twice, got {list(layers)}")
        require_choice("mode", self.mode, get_args(Mode))
        require_bool("share_values", self.share_values)
        require_choice("value_bits", self.value_bits, (None, *BITS))

    def check_fits(self, *, num_blocks: int, hidden_size: int) -> None:
        """Raises `ValueError` unless a model of so many blocks of that width has the blocks of `layers`."""
        last = self.layers[-1]
        if not isinstance(last, int):
            return
        if last > num_blocks:
            raise ValueError(f"layers must be within 1..{num_blocks}, the blocks of this model, got {last}")
        if self.config.dim != hidden_size:
            raise ValueError(f"config.dim must be {hidden_size}, the hidden size of this model, got {self.config.dim}")

    @property
    def is_numbered(self) -> bool:
        """Whether `layers` are numbers of blocks, not names of modules."""
        return isinstance(self.layers[0], int)

    def at(self, names: Sequence[str]) -> "MemoryPlacement":
        """The same in a model whose modules have these names; block numbers stay."""
        return self if self.is_numbered else dataclasses.replace(self, layers=names)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives an equal placement back."""
        section = {
            "config": self.config.to_dict(),
            "kind": self.kind,
            "layers": list(self.layers),
            "mode": self.mode,
            "share_values": self.share_values,
        }
        # Left out of other folders, which earlier versions can load.
        return section if self.value_bits is None else {**section, "value_bits": self.value_bits}

    @classmethod
    def from_dict(cls, section: object) -> "MemoryPlacement":
        """The inverse of `to_dict`. Raises `ValueError` for an unknown or a missing key."""
        if not isinstance(section, dict):
            raise ValueError(f"memory must be a dictionary of {', '.join(_KEYS)}, got {section!r}")
        for key in section:
            if key not in (*_KEYS, "value_bits"):
                raise ValueError(f"unknown key {key!r} in memory; allowed: {', '.join(_KEYS)}, value_bits")
        for key in _KEYS:
            if key not in section:
                raise ValueError(f"memory must have the keys {', '.join(_KEYS)}; {key!r} is missing")
        if not isinstance(section["config"], dict):
            raise ValueError(f"memory.config must be a dictionary, got {section['config']!r}")
        return cls(**{**section, "config": MemoryConfig.from_dict(section["config"])})
