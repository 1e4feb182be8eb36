"""RunConfig: everything that decides the result of a run, and nothing about where it is stored."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args, get_type_hints

from memlayers.checks import require_betas, require_bool, require_choice, require_int, require_number
from memlayers.config import MemoryConfig, instead
from memlayers.lm.data.config import DataConfig

Family = Literal["gpt2", "llama"]
Schedule = Literal["cosine", "inverse_sqrt", "constant"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

_WITHOUT_EFFECT = ("training.save_every_tokens", "training.keep_checkpoints")  # on the result of a run


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer that carries the memory: a Hugging Face causal language model, built from scratch."""

    family: Family = "gpt2"  # "gpt2": learned positions, GELU; "llama": rotary positions, gated SiLU
    layers: int = 4  # number of blocks
    dim: int = 256  # D, width of the model
    heads: int = 4  # attention heads; they divide dim
    context: int = 256  # tokens that a prediction sees at most, and tokens predicted in one window
    dropout: float = 0.0  # on embeddings, attention and residuals (gpt2); on attention (llama)

    def __post_init__(self) -> None:
        require_choice("model.family", self.family, get_args(Family))
        for name in ("layers", "dim", "heads", "context"):
            require_int(f"model.{name}", getattr(self, name), least=1)
        if self.dim % self.heads:
            raise ValueError(f"model.heads must divide model.dim = {self.dim}, got {self.heads}")
        if self.family == "llama" and (self.dim // self.heads) % 2:
            raise ValueError(
                f"model.dim / model.heads must be even for rotary positions, got {self.dim} / {self.heads}"
            )
        require_number("model.dropout", self.dropout, least=0.0, below=1.0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long a model is trained, with which step, and how often it is looked at."""

    tokens: int = 2_000_000  # training budget; rounded up to whole steps; text is seen again once it runs out
    batch_tokens: int = 4096  # tokens predicted in one step; a multiple of model.context
    accumulate: int = 1  # parts that a step is computed in, one after the other: less memory; each has its BatchNorm
    learning_rate: float = 2e-3  # peak, of everything but the memory's values
    value_learning_rate: float = 3e-2  # of the memory's values; constant, whatever the schedule
    schedule: Schedule = "cosine"  # after the warm-up: to zero on a cosine, by the inverse square root, or not at all
    warmup: float = 0.05  # linear warm-up: a share of the steps if below 1, else a number of steps
    weight_decay: float = 0.0  # of weight matrices; never of norms, biases and the memory's values
    betas: tuple[float, float] = (0.9, 0.98)  # decay rates of Adam's two moments
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    precision: Precision = "auto"  # "auto": bf16 on a GPU that has it, else fp32
    eval_every_tokens: int = 200_000  # training tokens between two evaluations; rounded up to whole steps
    eval_tokens: int = 65_536  # validation tokens of an evaluation: the longest prefix of whole documents
    save_every_tokens: int | None = None  # training tokens between two checkpoints; None: one at every evaluation
    keep_checkpoints: int = 2  # newest checkpoints kept while the run goes on; a finished run has its model instead
    seed: int = 0  # of the model's initialisation, of dropout and of the order of the data
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, more time

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):  # from JSON and YAML
            object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("tokens", "batch_tokens", "accumulate", "eval_every_tokens", "keep_checkpoints"):
            require_int(f"training.{name}", getattr(self, name), least=1)
        if self.save_every_tokens is not None:
            require_int("training.save_every_tokens", self.save_every_tokens, least=1)
        require_int("training.eval_tokens", self.eval_tokens, least=2)
        require_int("training.seed", self.seed, least=0, most=2**32 - 1)
        for name in ("learning_rate", "value_learning_rate"):
            require_number(f"training.{name}", getattr(self, name), above=0.0)
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            require_number(f"training.{name}", getattr(self, name), least=0.0)
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"training.warmup must be a share below 1 or a whole number of steps, got {self.warmup!r}")
        require_betas("training.betas", self.betas)
        require_choice("training.schedule", self.schedule, get_args(Schedule))
        require_choice("training.precision", self.precision, get_args(Precision))
        require_bool("training.gradient_checkpointing", self.gradient_checkpointing)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * self.steps)

    @property
    def eval_every_steps(self) -> int:
        """Optimizer steps between two evaluations."""
        return math.ceil(self.eval_every_tokens / self.batch_tokens)

    @property
    def save_every_steps(self) -> int:
        """Optimizer steps between two checkpoints."""
        return math.ceil((self.save_every_tokens or self.eval_every_tokens) / self.batch_tokens)

    @property
    def checkpoints(self) -> int:
        """Checkpoints of the run; there is none of the last step, which is followed by the finished model."""
        return (self.steps - 1) // self.save_every_steps


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. Raises `ValueError` naming the field, its value and what is allowed."""

    data: DataConfig = field(default_factory=DataConfig)  # the text and its tokens
    model: ModelConfig = field(default_factory=ModelConfig)  # the transformer
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(dim=ModelConfig().dim))  # one memory layer
    memory_layers: tuple[int, ...] = ()  # blocks whose FFN is a memory, counted from 1; empty: a plain transformer
    training: TrainingConfig = field(default_factory=TrainingConfig)  # the budget and the step

    def __post_init__(self) -> None:
        for name, kind in section_types(type(self)).items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        if isinstance(self.memory_layers, list):  # from JSON and YAML
            object.__setattr__(self, "memory_layers", tuple(self.memory_layers))
        if not isinstance(self.memory_layers, tuple):
            raise ValueError(f"memory_layers must be a sequence of block numbers, got {self.memory_layers!r}")
        for layer in self.memory_layers:
            require_int("memory_layers", layer, least=1, most=self.model.layers)
        if len(set(self.memory_layers)) != len(self.memory_layers):
            raise ValueError(f"memory_layers must name each block once, got {self.memory_layers!r}")
        if self.memory.dim != self.model.dim:
            raise ValueError(f"memory.dim must be model.dim = {self.model.dim}, got {self.memory.dim}")
        if self.training.batch_tokens % self.model.context:
            raise ValueError(
                f"training.batch_tokens must be a multiple of model.context = {self.model.context}, "
                f"got {self.training.batch_tokens}"
            )
        if self.batch_windows % self.training.accumulate:
            raise ValueError(
                f"training.accumulate must divide the {self.batch_windows} windows of a step "
                f"(training.batch_tokens / model.context), got {self.training.accumulate}"
            )
        part_tokens = self.training.batch_tokens // self.training.accumulate
        if self.memory_layers and self.memory.query_norm == "batch" and part_tokens < 2:
            raise ValueError(
                "training.batch_tokens / training.accumulate must be at least 2 with memory.query_norm 'batch', whose "
                f"statistics are over these tokens, got {part_tokens}"
            )
        if self.training.precision == "fp16" and self.memory_layers:
            raise ValueError(
                "training.precision must be auto, fp32 or bf16 with a memory, got 'fp16': "
                "loss scaling does not reach the gradients of the memory's values"
            )

    @property
    def batch_windows(self) -> int:
        """Windows of `model.context` predictions in one step."""
        return self.training.batch_tokens // self.model.context

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives an equal configuration back."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; takes ``section.field`` for a field of a section, too.

        A field that is not there has its default, and `memory.dim` is `model.dim`. Raises `ValueError` for an unknown
        field.
        """
        sections: dict[str, dict[str, Any]] = {}
        built: dict[str, Any] = {}
        for name, value in flat_fields(cls, fields).items():
            section, _, inner = name.rpartition(".")
            (sections.setdefault(section, {}) if section else built)[inner] = _tuples(value)
        for section, values in sections.items():
            if section != "memory":
                built[section] = section_types(cls)[section](**values)
        model = built.get("model") or ModelConfig()
        try:
            built["memory"] = MemoryConfig.from_dict({"dim": model.dim, **sections.get("memory", {})})
        except ValueError as error:  # a memory by itself has no section
            raise ValueError(f"memory.{error}") from None
        return cls(**built)


def section_types(config: type[RunConfig]) -> dict[str, type]:
    """The fields of a configuration that are dataclasses themselves, and which."""
    hints = get_type_hints(config)
    return {
        entry.name: hints[entry.name]
        for entry in dataclasses.fields(config)
        if dataclasses.is_dataclass(hints[entry.name])
    }


def field_types(config: type[RunConfig]) -> dict[str, Any]:
    """The type of every field, those of the sections as ``section.field``."""
    sections, types = section_types(config), {}
    for name, hint in get_type_hints(config).items():
        if name in sections:
            types.update({f"{name}.{inner}": kind for inner, kind in get_type_hints(sections[name]).items()})
        else:
            types[name] = hint
    return types


def flat_fields(config: type[RunConfig], fields: object, place: str = "") -> dict[str, Any]:
    """Nested or dotted fields -> their values by ``section.field``.

    Raises `ValueError`, which names `place`, for a field that `config` does not have, that is given twice, or that
    should hold fields and does not.
    """
    where = f" in {place}" if place else ""
    sections, known = section_types(config), field_types(config)
    flat: dict[str, Any] = {}
    for name, value in _entries("a configuration", fields, where):
        if name in sections:
            found = [(f"{name}.{inner}", item) for inner, item in _entries(name, value, where)]
        else:
            found = [(str(name), value)]
        for full, item in found:
            if full not in known:
                raise ValueError(f"unknown configuration field {full!r}{where}; {instead(full, [*known, *sections])}")
            if full in flat:
                raise ValueError(f"configuration field {full!r} is given twice{where}")
            flat[full] = item
    return flat


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """The fields in which two configurations differ, as ``field: value of one, value of the other``.

    What cannot change the result is left out: when checkpoints are written, and what describes a memory when neither
    has one.
    """
    left, right = (flat_fields(type(config), config.to_dict()) for config in (one, other))
    names = [name for name in left if left[name] != right[name] and name not in _WITHOUT_EFFECT]
    if not one.memory_layers and not other.memory_layers:
        names = [name for name in names if not name.startswith("memory.") and name != "training.value_learning_rate"]
    return [f"{name}: {left[name]!r}, {right[name]!r}" for name in names]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _entries(what: str, fields: object, where: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(fields, Mapping):
        raise ValueError(f"{what} must hold fields and their values, got {fields!r}{where}")
    return fields.items()
