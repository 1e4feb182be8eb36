"""DataConfig: which text a model is trained on, and how it becomes tokens."""

from dataclasses import dataclass

from memlayers.checks import check_settings, setting
from memlayers.lm.data.tokenize import SMALLEST_VOCABULARY


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents, and how they become tokens.

    The md5 hash of a document's id, or of its text if it has no id, decides its split: with h its remainder by 100 and
    p the `holdout_percent`, h < p is validation, p <= h < 2p test, the rest training. (PyTorch's sources have their
    paths for ids, and near-copies the path of the first of them.)
    """

    sources: tuple[str, ...] = setting((), "files, folders, globs or hf:DATASET; none: PyTorch's Python sources")
    weights: tuple[float, ...] = setting(
        (), "share of the training windows that each source gives; none: by their sizes", above=0
    )
    text_field: str = setting("text", "of a record: the document")
    id_field: str = setting("id", "of a record: what decides its split; one that lacks it, or all if empty: its text")
    holdout_percent: int | None = setting(
        None,
        "of the documents, for validation and again for test; None: 1, but 5 of the default text",
        least=1,
        most=49,
    )
    vocab_size: int = setting(
        8192, "tokens, the 256 bytes and <|endoftext|> included", least=SMALLEST_VOCABULARY, most=1 << 31
    )
    tokenizer: str | None = setting(
        None, "folder of a corpus, a run or a model whose tokenizer is used, whatever vocab_size is; none: a new one"
    )
    tokenizer_megabytes: float = setting(
        16.0, "of training text, a random sample, that the tokenizer is trained on", above=0
    )
    skip_malformed: bool = setting(
        False, "leave out malformed records and count them, instead of stopping at the first"
    )

    def __post_init__(self) -> None:
        check_settings(self, "data")
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"data.weights must be empty or have one number for each of the {len(self.sources)} sources, "
                f"got {list(self.weights)}"
            )
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if not self.text_field:
            raise ValueError("data.text_field must be the name of a field, got ''")

    def resolved_holdout_percent(self) -> int:
        """Return the share in use: the 1,875 files of PyTorch need a larger one than a large collection."""
        if self.holdout_percent is not None:
            return self.holdout_percent
        return 1 if self.sources else 5
