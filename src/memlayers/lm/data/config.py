"""DataConfig: which text a model is trained on, and how it becomes tokens."""

import math
from dataclasses import dataclass

from memlayers.lm.data.tokenize import END_OF_TEXT, SMALLEST_VOCABULARY


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
        percent = self.holdout_percent
        if percent is not None and not (_is_integer(percent) and 1 <= percent <= 49):
            raise ValueError(f"data.holdout_percent must be an integer from 1 to 49, or None, got {percent!r}")
        if not _is_integer(self.vocab_size) or not SMALLEST_VOCABULARY <= self.vocab_size <= 1 << 31:
            raise ValueError(
                f"data.vocab_size must be an integer from {SMALLEST_VOCABULARY} (every byte and {END_OF_TEXT}) to "
                f"2**31, got {self.vocab_size!r}"
            )
        if not _is_positive(self.tokenizer_megabytes):
            raise ValueError(
                f"data.tokenizer_megabytes must be a finite number above 0, got {self.tokenizer_megabytes!r}"
            )
        if not isinstance(self.skip_malformed, bool):
            raise ValueError(f"data.skip_malformed must be true or false, got {self.skip_malformed!r}")

    def _check_weights(self) -> None:
        if not isinstance(self.weights, list | tuple) or not all(_is_positive(weight) for weight in self.weights):
            raise ValueError(f"data.weights must be a list of finite numbers above 0, got {self.weights!r}")
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


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
