"""The scales of the experiments: sizes, budgets and rates, all in one place.

What sweeps find is written here: the rates of each model, the recipe of the memory, where it stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from memlayers.checks import require_choice
from memlayers.config import MemoryConfig
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig, flat_fields
from memlayers.lm.data import DataConfig
from memlayers.lm.presets import preset

ScaleName = Literal["laptop", "gpu", "paper"]
EVALUATIONS = 10  # of a run: the points of its curve


def changed(config: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    """A configuration with some fields, ``section.field``, replaced; the memory is as wide as the model."""
    flat = {**flat_fields(RunConfig, config.to_dict()), **fields}
    flat.pop("memory.dim")
    return RunConfig.from_dict(flat)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The models and budgets of all experiments at one size of machine."""

    name: ScaleName
    base: RunConfig  # N layers without a memory; its memory is the one that experiments add
    layer: int  # where a single memory stands in N layers
    several: tuple[tuple[int, ...], ...]  # where several memories stand in N layers
    paper_recipe: Mapping[str, Any]  # its memory and ratio of rates: the values at a constant 4 times the rest
    rates: tuple[float, ...]  # that each model of `depth` is tried at
    value_rates: tuple[float, ...]  # of `updates`
    deep_rate: float  # of more than N layers, elsewhere
    subkeys: tuple[int, ...]  # of `size`
    flat_subkeys: tuple[int, ...]  # of `flat`, as far as flat keys can be trained
    dense_sizes: tuple[tuple[int, int, int, float], ...]  # of `equivalent`: layers, width, heads, rate
    grid_tokens: int
    flat_tokens: int
    final_tokens: int
    seeds: int  # of a point whose difference is claimed
    noise_seeds: int
    threads: int | None  # of a run; None: as many as PyTorch takes
    multiplications_per_s: float  # of one run in training, about: for estimates
    position_layers: int = 6  # of `position`
    reads: int = 64  # H * K of `heads-k`

    @property
    def layers(self) -> int:
        """N."""
        return self.base.model.layers

    def run(
        self,
        *memory_layers: int,
        layers: int | None = None,
        tokens: int | None = None,
        seed: int = 0,
        fields: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        """A run: the base with memories in some layers, and further fields; at the budget of grids."""
        tokens = self.grid_tokens if tokens is None else tokens
        return changed(
            self.base,
            {
                "memory_layers": memory_layers,
                "model.layers": self.layers if layers is None else layers,
                **({"training.learning_rate": self.deep_rate} if layers and layers > self.layers else {}),
                "training.tokens": tokens,
                "training.eval_every_tokens": -(-tokens // EVALUATIONS),
                "training.seed": seed,
                **(fields or {}),
            },
        )


def scale(name: str, *, train_tokens: int | None = None, vocab_size: int | None = None) -> Scale:
    """The scale of that name. Raises `ValueError` for an unknown one.

    Args:
        train_tokens: Of the corpus: the largest budgets stop there, so that no text is seen twice.
        vocab_size: Of the corpus.
    """
    require_choice("scale", name, get_args(ScaleName))
    fields: dict[str, Any] = {"laptop": _laptop, "gpu": _gpu, "paper": _paper}[name]()
    base: RunConfig = fields["base"]
    if vocab_size is not None:
        fields["base"] = changed(base, {"data.vocab_size": vocab_size})
    if train_tokens is not None:
        most = train_tokens - train_tokens % base.training.batch_tokens
        fields["final_tokens"] = min(fields["final_tokens"], max(most, fields["grid_tokens"]))
    return Scale(name=name, **fields)  # type: ignore[arg-type]  # checked above


# The rates of the memory are in the ratio of the paper (docs/log.md); `depth` sweeps that of the rest.
def _laptop() -> dict[str, Any]:
    """Two CPU cores, an evening for an experiment."""
    return {
        "base": RunConfig(
            data=DataConfig(vocab_size=8192),
            model=ModelConfig(family="llama", layers=2, dim=128, heads=4, context=256),
            memory=MemoryConfig(dim=128, heads=2, topk=32, num_subkeys=256, query_dim=128),
            training=TrainingConfig(
                batch_tokens=1024,
                learning_rate=5.6e-3,
                value_learning_rate=2.24e-2,
                warmup=600,
                eval_tokens=57_344,
                save_every_tokens=200_000,
                precision="fp32",
            ),
        ),
        "layer": 2,
        "several": ((1, 2),),
        "paper_recipe": {"memory.heads": 4},
        "rates": (4e-3, 5.6e-3, 8e-3),
        "value_rates": (5.6e-3, 2.24e-2, 9e-2),
        "deep_rate": 5.6e-3,
        "subkeys": (64, 128, 256, 384),
        "flat_subkeys": (128, 256),
        "dense_sizes": (
            (2, 96, 3, 5.6e-3),
            (2, 128, 4, 5.6e-3),
            (4, 128, 4, 5.6e-3),
            (6, 128, 4, 4e-3),
        ),
        "grid_tokens": 3_000_000,
        "flat_tokens": 1_000_000,
        "final_tokens": 20_000_000,
        "seeds": 2,
        "noise_seeds": 5,
        "threads": 1,
        "multiplications_per_s": 25e9,
        "position_layers": 3,
    }


def _gpu() -> dict[str, Any]:
    """One large GPU, an hour for an experiment."""
    return {
        "base": RunConfig(
            data=DataConfig(vocab_size=8192),
            model=ModelConfig(layers=4, dim=512, heads=8, context=512),
            memory=MemoryConfig(dim=512, heads=4, topk=32, num_subkeys=256, query_dim=256),
            training=TrainingConfig(
                batch_tokens=16_384,
                learning_rate=1e-3,
                value_learning_rate=1e-2,
                eval_tokens=500_000,
                save_every_tokens=10_000_000,
            ),
        ),
        "layer": 3,
        "several": ((2, 3), (2, 3, 4)),
        "paper_recipe": {"training.value_learning_rate": 4e-3},
        "rates": (5e-4, 1e-3, 2e-3),
        "value_rates": (1e-3, 3e-3, 1e-2, 3e-2),
        "deep_rate": 7e-4,
        "subkeys": (128, 256, 384, 512, 768, 1024),
        "flat_subkeys": (128, 256),
        "dense_sizes": (
            (4, 384, 6, 1.2e-3),
            (4, 512, 8, 1e-3),
            (8, 512, 8, 7e-4),
            (8, 768, 12, 5e-4),
            (12, 1024, 16, 4e-4),
        ),
        "grid_tokens": 40_000_000,
        "flat_tokens": 10_000_000,
        "final_tokens": 200_000_000,
        "seeds": 2,
        "noise_seeds": 3,
        "threads": None,
        "multiplications_per_s": 5e13,
    }


def _paper() -> dict[str, Any]:
    """The paper's models. Its text says nothing about the context, the batch and the warm-up."""
    run = preset("paper-12x1024").run()
    return {
        "base": changed(run, {"memory_layers": ()}),
        "layer": 9,
        "several": ((4, 9), (3, 6, 9)),
        "paper_recipe": {},
        "rates": (2.5e-4,),
        "value_rates": (2.5e-4, 1e-3, 4e-3),
        "deep_rate": 2.5e-4,
        "subkeys": (128, 256, 384, 512, 768, 1024),
        "flat_subkeys": (128, 256, 384),
        "dense_sizes": (
            (6, 1024, 16, 2.5e-4),
            (12, 1024, 16, 2.5e-4),
            (16, 1024, 16, 2.5e-4),
            (24, 1024, 16, 2.5e-4),
            (12, 1600, 16, 2.5e-4),
        ),
        "grid_tokens": run.training.tokens,
        "flat_tokens": run.training.tokens,
        "final_tokens": run.training.tokens,
        "seeds": 1,
        "noise_seeds": 2,
        "threads": None,
        "multiplications_per_s": 2e14,
    }
