"""Configurations with a name, and the comparison that the paper is about."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from memlayers.checks import setting
from memlayers.config import MemoryConfig
from memlayers.lm.config import MOST_RATE, ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.data import DataConfig


@dataclass(frozen=True, kw_only=True)
class Comparison(RunConfig):
    """A model of N layers with a memory, and with it the two it is compared to: N layers and 2N layers without.

    Everything else is the same in all three but the learning rate, which deeper models want to be lower: a comparison
    is as good as its baselines.
    """

    base_learning_rate: float | None = setting(
        None, "of the N layers without a memory; None: training.learning_rate", above=0, below=MOST_RATE
    )
    deep_learning_rate: float | None = setting(
        None, "of the 2N layers; None: training.learning_rate", above=0, below=MOST_RATE
    )

    def run(self) -> RunConfig:
        """The model that the preset is named for: N layers, with the memory if it has one."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)})

    def runs(self) -> dict[str, RunConfig]:
        """The three runs by the names of their folders. Raises `ValueError` if there is no memory to compare."""
        if not self.memory_layers:
            raise ValueError("memory_layers must name at least one block for a comparison, got ()")
        if self.training.begin_with is not None:
            raise ValueError(
                f"training.begin_with must be None for a comparison of models, got {self.training.begin_with!r}"
            )
        if self.base is not None:
            raise ValueError(f"base must be None for a comparison of models, got {self.base!r}")
        layers, run = self.model.layers, self.run()
        return {
            f"{layers}-layers": self._baseline(layers, self.base_learning_rate),
            f"{2 * layers}-layers": self._baseline(2 * layers, self.deep_learning_rate),
            f"{layers}-layers-memory": run,
        }

    def _baseline(self, layers: int, learning_rate: float | None) -> RunConfig:
        rate = self.training.learning_rate if learning_rate is None else learning_rate
        return dataclasses.replace(
            self.run(),
            model=dataclasses.replace(self.model, layers=layers),
            memory_layers=(),
            training=dataclasses.replace(self.training, learning_rate=rate),
        )


# Of a memory beside a trained model: as `memory_preset("retrofit", model)` of `memlayers.models`, and its rates.
RETROFIT: dict[str, Any] = {
    "memory.heads": 4,
    "memory.topk": 32,
    "memory.num_subkeys": 256,
    "memory.query_dim": 256,
    "memory.query_norm": "rms",
    "memory_mode": "parallel",
    "training.learning_rate": 1e-3,
    "training.value_learning_rate": 1e-2,
}


def preset_names() -> tuple[str, ...]:
    """Names that `preset` knows."""
    return ("demo", "paper-12x1024", "paper-24x1024")


def preset(name: str) -> Comparison:
    """The configuration of that name. Raises `ValueError` for an unknown one."""
    if name == "demo":
        return _demo()
    if name == "paper-12x1024":
        return _paper(layers=12, memory_layers=(9,))
    if name == "paper-24x1024":
        return _paper(layers=24, memory_layers=())
    raise ValueError(f"preset must be one of {', '.join(map(repr, preset_names()))}, got {name!r}")


def _demo() -> Comparison:
    """A few minutes on two CPU cores, on text that every machine has."""
    return Comparison(
        data=DataConfig(vocab_size=4096),
        model=ModelConfig(layers=4, dim=128, heads=4, context=256),
        memory=MemoryConfig(dim=128, heads=4, topk=8, num_subkeys=128, query_dim=128, value_std=0.0),
        memory_layers=(3,),
        training=TrainingConfig(
            tokens=700_000,
            batch_tokens=1024,
            learning_rate=2.8e-3,
            value_learning_rate=5e-2,
            value_schedule="same",
            selector_learning_rate=3e-4,
            warmup=0.3,  # a short one keeps the first blocks' outputs in a few dimensions, and queries with them
            eval_every_tokens=140_000,
            eval_tokens=100_000,  # the first 14 files; 60,000 tokens have 7 of them
        ),
        base_learning_rate=4e-3,
        deep_learning_rate=4e-3,
    )


def _paper(*, layers: int, memory_layers: tuple[int, ...]) -> Comparison:
    """The paper's models of width 1024. Its text says nothing about the context, the batch and the warm-up."""
    return Comparison(
        data=DataConfig(vocab_size=60_000, tokenizer_megabytes=64.0),
        model=ModelConfig(layers=layers, dim=1024, heads=16, context=512, dropout=0.0),
        memory=MemoryConfig(dim=1024, heads=4, topk=32, num_subkeys=512, query_dim=512),
        memory_layers=memory_layers,
        training=TrainingConfig(
            tokens=2_000_000_000,
            batch_tokens=16_384,
            learning_rate=2.5e-4,
            value_learning_rate=1e-3,
            schedule="inverse_sqrt",
            warmup=4000,
            betas=(0.9, 0.98),
            eval_every_tokens=50_000_000,
            eval_tokens=1_000_000,
        ),
    )
