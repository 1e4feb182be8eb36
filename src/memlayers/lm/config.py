"""RunConfig: everything that decides the result of a run, and nothing about where it is stored."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from memlayers.checks import Setting, check_settings, instead, require_int, setting, settings_of
from memlayers.config import MemoryConfig
from memlayers.lm.data.config import DataConfig

Family = Literal["gpt2", "llama", "pretrained"]
Schedule = Literal["cosine", "inverse_sqrt", "constant"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
ValueSchedule = Literal["constant", "same"]
ValueOptimizer = Literal["rows", "dense", "sparse"]
MemoryKind = Literal["memory", "memory_plus", "experts"]
MemoryMode = Literal["replace", "parallel"]

MOST_RATE = 1e6  # torch's optimizers break off where a rate over a bias correction is no float32
HOST, MAPPED = "host", "mapped:"  # in `RunConfig.memory_values`; the folder follows
_WITHOUT_EFFECT = ("training.save_every_tokens", "training.keep_checkpoints")  # on the result of a run
OF_MEMORIES = ("memory", "training.value_", "training.selector_")  # without effect where there are none


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer that carries the memory: a Hugging Face causal language model, built from scratch, or `base`."""

    family: Family = setting(
        "gpt2", '"gpt2": learned positions, GELU; "llama": rotary positions, gated SiLU; "pretrained": that of `base`'
    )
    layers: int = setting(4, "number of blocks", least=1)
    dim: int = setting(256, "D, width of the model", least=1)
    heads: int = setting(4, "attention heads; they divide dim", least=1)
    context: int = setting(256, "tokens that a prediction sees at most, and tokens predicted in one window", least=1)
    dropout: float = setting(
        0.0, "on embeddings, attention and residuals (gpt2); on attention (llama)", least=0, below=1
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        if self.family != "pretrained" and self.dim % self.heads:
            raise ValueError(f"model.heads must divide model.dim = {self.dim}, got {self.heads}")
        if self.family == "llama" and (self.dim // self.heads) % 2:
            raise ValueError(
                f"model.dim / model.heads must be even for rotary positions, got {self.dim} / {self.heads}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long a model is trained, with which step, and how often it is looked at."""

    tokens: int = setting(
        2_000_000, "training budget; rounded up to whole steps; text is seen again once it runs out", least=1
    )
    batch_tokens: int = setting(4096, "tokens predicted in one step; a multiple of model.context", least=1)
    accumulate: int = setting(
        1, "parts that a step is computed in, one after the other: less memory; each has its BatchNorm", least=1
    )
    learning_rate: float = setting(2e-3, "peak, of everything but the memory's values", above=0, below=MOST_RATE)
    value_learning_rate: float = setting(3e-2, "of the memory's values", above=0, below=MOST_RATE)
    value_optimizer: ValueOptimizer = setting(
        "rows", '"rows": RowAdam; "dense", "sparse": Adam and SparseAdam of PyTorch, to compare with'
    )
    value_schedule: ValueSchedule = setting(
        "constant", '"constant": value_learning_rate throughout; "same": as a peak, on the schedule of the rest'
    )
    selector_learning_rate: float | None = setting(
        None,
        "peak, of the memory's query (with its norm) and keys; 0: frozen; None: learning_rate",
        least=0,
        below=MOST_RATE,
    )
    schedule: Schedule = setting(
        "cosine", "after the warm-up: to zero on a cosine, by the inverse square root, or not at all"
    )
    warmup: float = setting(0.05, "linear warm-up: a share of the steps if below 1, else a number of steps", least=0)
    weight_decay: float = setting(0.0, "of weight matrices; never of norms, biases and the memory's values", least=0)
    betas: tuple[float, float] = setting((0.9, 0.98), "decay rates of Adam's two moments", least=0, below=1)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0: never", least=0)
    precision: Precision = setting("auto", '"auto": bf16 on a GPU that has it, else fp32')
    eval_every_tokens: int = setting(
        200_000, "training tokens between two evaluations; rounded up to whole steps", least=1
    )
    eval_tokens: int = setting(
        65_536, "validation tokens of an evaluation: the longest prefix of whole documents, at least one", least=2
    )
    save_every_tokens: int | None = setting(
        None, "training tokens between two checkpoints; None: one at every evaluation", least=1
    )
    keep_checkpoints: int = setting(
        2, "newest checkpoints kept while the run goes on; a finished run has its model instead", least=1
    )
    seed: int = setting(
        0, "of the model's initialisation, of dropout and of the order of the data", least=0, most=2**32 - 1
    )
    begin_with: str | None = setting(
        None,
        "folder of a finished run with whose model this one begins; its schedule and moments are new",
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, more time")

    def __post_init__(self) -> None:
        check_settings(self, "training")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"training.warmup must be a share below 1 or a whole number of steps, got {self.warmup!r}")

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
    memory_layers: tuple[int, ...] = setting(
        (), "blocks whose FFN is a memory, counted from 1; empty: a plain transformer", least=1
    )
    memory_kind: MemoryKind = setting(
        "memory",
        '"memory": MemoryLayer, as in the paper; "memory_plus": MemoryPlus, unit keys and a gated output; "experts": '
        "Experts, a slot is a neuron",
    )
    memory_mode: MemoryMode = setting(
        "replace", '"replace": a memory in place of the FFN; "parallel": beside it, behind a gate that begins at zero'
    )
    memory_share_values: bool = setting(False, "one table for all memories; queries and keys stay their own")
    memory_values: str = setting(
        "memory",
        'where tables of values are trained: "memory", beside the model; "host", which keeps them off a GPU; or '
        '"mapped:FOLDER", in files, which may be larger than memory',
    )
    base: str | None = setting(
        None,
        "folder of a trained model, beside whose FFNs the memories are put; `model` says its sizes; None: from scratch",
    )
    train_base: bool = setting(False, "train the base, too, and save the whole model; else the memories alone")
    training: TrainingConfig = field(default_factory=TrainingConfig)  # the budget and the step

    def __post_init__(self) -> None:
        for name, kind in SECTIONS.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        check_settings(self)
        for layer in self.memory_layers:
            require_int("memory_layers", layer, least=1, most=self.model.layers)
        if len(set(self.memory_layers)) != len(self.memory_layers):
            raise ValueError(f"memory_layers must name each block once, got {self.memory_layers!r}")
        if self.memory_share_values and len(self.memory_layers) == 1:
            raise ValueError("memory_share_values must be False with a single one in memory_layers, got True")
        if self.memory_layers and self.memory_kind == "memory_plus" and self.memory.keys != "product":
            raise ValueError(
                f"memory.keys must be 'product' with memory_kind {self.memory_kind!r}, got {self.memory.keys!r}"
            )
        if self.memory_values != "memory":
            self._check_tables_elsewhere()
        self._check_base()
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
    def tables_in_files(self) -> bool:
        """Whether tables of values are trained in files."""
        return bool(self.memory_layers) and self.memory_values.startswith(MAPPED)

    @property
    def tables_on_host(self) -> bool:
        """Whether tables of values are trained on the host, wherever the model is."""
        return bool(self.memory_layers) and self.memory_values == HOST

    @property
    def base_is_frozen(self) -> bool:
        """Whether there is a base, of which nothing is trained or saved."""
        return self.base is not None and not self.train_base

    def _check_base(self) -> None:
        if self.base is None:
            if self.model.family == "pretrained":
                raise ValueError("model.family must be 'gpt2' or 'llama' without a base, got 'pretrained'")
            if self.train_base:
                raise ValueError("train_base must be False without a base, got True")
            return
        for name, value, allowed in (
            ("model.family", self.model.family, "pretrained"),
            ("memory_mode", self.memory_mode, "parallel"),
        ):
            if value != allowed:
                raise ValueError(f"{name} must be {allowed!r} beside a base, got {value!r}")
        if self.tables_in_files:
            raise ValueError(f"memory_values must be 'memory' or 'host' beside a base, got {self.memory_values!r}")
        if not self.memory_layers:
            raise ValueError("memory_layers must name at least one block of the base, got ()")

    def _check_tables_elsewhere(self) -> None:
        if self.memory_values != HOST and (not self.memory_values.startswith(MAPPED) or self.memory_values == MAPPED):
            raise ValueError(f"memory_values must be 'memory', 'host' or 'mapped:FOLDER', got {self.memory_values!r}")
        if self.memory_kind == "experts":
            raise ValueError("memory_values must be 'memory' with memory_kind 'experts', whose tables are of their own")
        if self.training.value_optimizer != "rows":
            raise ValueError(
                f"training.value_optimizer must be 'rows' for memory_values {self.memory_values!r}, got "
                f"{self.training.value_optimizer!r}"
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
        parts: dict[str, dict[str, Any]] = {"": {}, **{section: {} for section in SECTIONS}}
        for name, value in flat_fields(cls, fields).items():
            section, _, inner = name.rpartition(".")
            parts[section][inner] = value
        built = {section: kind(**parts[section]) for section, kind in SECTIONS.items() if section != "memory"}
        try:
            built["memory"] = MemoryConfig(**{"dim": built["model"].dim, **parts["memory"]})
        except ValueError as error:  # a memory by itself has no section
            raise ValueError(f"memory.{error}") from None
        return cls(**built, **parts[""])


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "memory": MemoryConfig,
    "training": TrainingConfig,
}


def run_settings(config: type[RunConfig]) -> dict[str, Setting]:
    """All settings of a run by name, those of its parts as ``section.field``."""
    parts = {"": config, **SECTIONS}
    return {
        f"{section}.{name}".lstrip("."): found
        for section, part in parts.items()
        for name, found in settings_of(part).items()
    }


def flat_fields(config: type[RunConfig], fields: object, place: str = "") -> dict[str, Any]:
    """Nested or dotted fields -> their values by ``section.field``.

    Raises `ValueError`, which names `place`, for a field that `config` does not have, that is given twice, or that
    should hold fields and does not.
    """
    where = f" in {place}" if place else ""
    known = run_settings(config)
    flat: dict[str, Any] = {}
    for name, value in _entries("a configuration", fields, where):
        is_section = isinstance(name, str) and name in SECTIONS
        inside = [(f"{name}.{inner}", item) for inner, item in _entries(name, value, where)] if is_section else []
        for full, item in inside if is_section else [(str(name), value)]:
            if full not in known:
                raise ValueError(f"unknown configuration field {full!r}{where}; {instead(full, [*known, *SECTIONS])}")
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
        names = [name for name in names if not name.startswith(OF_MEMORIES)]
    return [f"{name}: {left[name]!r}, {right[name]!r}" for name in names]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _entries(what: str, fields: object, where: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(fields, Mapping):
        raise ValueError(f"{what} must hold fields and their values, got {fields!r}{where}")
    return fields.items()
