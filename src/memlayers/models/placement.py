"""MemoryPlacement: which blocks of a model carry a memory, and whether they share one table of values.

`MemoryConfig` says what a memory is and nothing about where it goes; the two are saved together, under ``memory`` in a
model's ``config.json`` and alone in ``memory_config.json``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memlayers.config import MemoryConfig

MODE = "replace"  # the memory stands where the feed-forward network stood


@dataclass(frozen=True, kw_only=True)
class MemoryPlacement:
    """A memory configuration and where it goes. Raises `ValueError` naming the field, its value and what is allowed."""

    config: MemoryConfig  # what each memory is
    layers: Sequence[int]  # blocks that carry one, counted from 1 as in the paper; kept as an ascending tuple
    share_values: bool = False  # one table of values for all of them (queries and keys stay their own)

    def __post_init__(self) -> None:
        if not isinstance(self.config, MemoryConfig):
            raise ValueError(f"config must be a MemoryConfig, got {self.config!r}")
        layers = self.layers
        if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"layers must be a non-empty list of block numbers, counted from 1, got {layers!r}")
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
                raise ValueError(f"layers must be integers of at least 1 (blocks are counted from 1), got {layer!r}")
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers must not name a block twice, got {list(layers)}")
        object.__setattr__(self, "layers", tuple(sorted(layers)))
        if not isinstance(self.share_values, bool):
            raise ValueError(f"share_values must be True or False, got {self.share_values!r}")

    def check_fits(self, *, num_blocks: int, hidden_size: int) -> None:
        """Raises `ValueError` unless a model of `num_blocks` blocks of width `hidden_size` can carry these memories."""
        if self.layers[-1] > num_blocks:
            raise ValueError(f"layers must be within 1..{num_blocks}, the blocks of this model, got {self.layers[-1]}")
        if self.config.dim != hidden_size:
            raise ValueError(f"config.dim must be {hidden_size}, the hidden size of this model, got {self.config.dim}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives an equal placement back."""
        return {
            "config": self.config.to_dict(),
            "layers": list(self.layers),
            "mode": MODE,
            "share_values": self.share_values,
        }

    @classmethod
    def from_dict(cls, section: object) -> "MemoryPlacement":
        """The inverse of `to_dict`. Raises `ValueError` for an unknown or a missing key, or another mode."""
        known = ("config", "layers", "mode", "share_values")
        if not isinstance(section, dict):
            raise ValueError(f"memory must be a dictionary of {', '.join(known)}, got {section!r}")
        for key in section:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in memory; allowed: {', '.join(known)}")
        for key in known:
            if key not in section:
                raise ValueError(f"memory must have the keys {', '.join(known)}; {key!r} is missing")
        if section["mode"] != MODE:
            raise ValueError(f"memory.mode must be {MODE!r}, got {section['mode']!r}")
        if not isinstance(section["config"], dict):
            raise ValueError(f"memory.config must be a dictionary, got {section['config']!r}")
        return cls(
            config=MemoryConfig.from_dict(section["config"]),
            layers=section["layers"],
            share_values=section["share_values"],
        )
