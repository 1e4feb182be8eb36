"""What the tables of a run take and move in a step, calculated from its configuration."""

from memlayers.lm.config import RunConfig
from memlayers.storage.costs import StepBytes, step_bytes


def tables_of(config: RunConfig) -> int:
    """How many tables a run has."""
    return 1 if config.memory_share_values else len(config.memory_layers)


def costs_of(config: RunConfig) -> StepBytes:
    """What a step moves of each table of a run."""
    memory, training, readers = config.memory, config.training, len(config.memory_layers) // tables_of(config)
    return step_bytes(
        slots=memory.slots,
        width=memory.width,
        rows=memory.heads * memory.topk,
        tokens=training.batch_tokens * readers,
        parts=training.accumulate * readers,
    )


def rows_on_device(config: RunConfig) -> int:
    """Bytes of copied rows that a part of a step keeps on a GPU, of tables that are on the host."""
    kept = 1 if config.training.gradient_checkpointing else len(config.memory_layers)
    return kept * costs_of(config).on_device
