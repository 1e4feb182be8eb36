"""DataConfig: which text a model is trained on, and how it becomes tokens."""

from dataclasses import dataclass

from memlayers.checks import require_int, require_number
from memlayers.lm.data.tokenize import SMALLEST_VOCABULARY


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents, and how they become tokens.

    The md5 hash of a document's id, or of its text if it has no id, decides its split: with h its remainder by 100 and
    p the `holdout_percent`, h < p is validation, p <= h < 2p test, the rest training.
    """

    sources: tuple[str, ...] = ()  # files, folders, globs or hf:DATASET; none: Python's own standard library
    weights: tuple[float, ...] = ()  # share of the training windows that each source gives; none: by their sizes
    text_field: str = "text"  # of a record: the document
    id_field: str = "id"  # of a record: what its split is decided by; a record may lack it
    holdout_percent: int | None = (
        None  # of the documents, for validation and again for test; None: 1, but 5 of the library
    )
    vocab_size: int = 8192  # tokens, the 256 bytes and <|endoftext|> included
    tokenizer_megabytes: float = 16.0  # of training text, a random sample, that the tokenizer is trained on
    skip_malformed: bool = False  # leave out malformed records and count them, instead of stopping at the first

    def __post_init__(self) -> None:
        if not isinstance(self.sources, list | tuple) or not all(isinstance(path, str) for path in self.sources):
            raise ValueError(f"data.sources must be a list of paths as strings, got {self.sources!r}")
        object.__setattr__(self, "sources", tuple(self.sources))
        self._check_weights()
        for name in ("text_field", "id_field"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"data.{name} must be the name of a field, got {getattr(self, name)!r}")
        if self.holdout_percent is not None:
            require_int("data.holdout_percent", self.holdout_percent, least=1, most=49)
        require_int("data.vocab_size", self.vocab_size, least=SMALLEST_VOCABULARY, most=1 << 31)
        require_number("data.tokenizer_megabytes", self.tokenizer_megabytes, above=0.0)
        if not isinstance(self.skip_malformed, bool):
            raise ValueError(f"data.skip_malformed must be true or false, got {self.skip_malformed!r}")

    def _check_weights(self) -> None:
        if not isinstance(self.weights, list | tuple):
            raise ValueError(f"data.weights must be a list of numbers, got {self.weights!r}")
        for weight in self.weights:
            require_number("data.weights", weight, above=0.0)
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"data.weights must be empty or have one number for each of the {len(self.sources)} sources, "
                f"got {list(self.weights)}"
            )
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))

    def resolved_holdout_percent(self) -> int:
        """The share in use. A library of some 700 files needs a larger one than a collection of many thousands."""
        if self.holdout_percent is not None:
            return self.holdout_percent
        return 1 if self.sources else 5
