"""Memory finetuning: new text is learned by the rows that it reads and old text does not (Lin et al. 2510.15103).

    with SlotCounts(model) as counts, torch.no_grad():
        for batch in old_text:
            model(**batch)
    optimizer.choose_rows(select_slots(model, counts, new_batch, slots=500))

Read `counts` first (how often old text reads each slot), then `select` (which slots are specific to new text, and how
far each row may move). `names` (of tables in a model), `patch` (the rows that were changed, as a file), `facts`
(batches of questions with answers, and what is wrong with others) and `trainer_callback` (all of it in
`transformers.Trainer`) stand beside them.
"""

from typing import TYPE_CHECKING, Any

from memlayers.finetuning.counts import SlotCounts
from memlayers.finetuning.facts import facts_batch
from memlayers.finetuning.patch import MemoryPatch, memory_diff
from memlayers.finetuning.select import select_slots, slot_rates

if TYPE_CHECKING:
    from memlayers.finetuning.trainer_callback import MemoryFinetuning

__all__ = ["MemoryFinetuning", "MemoryPatch", "SlotCounts", "facts_batch", "memory_diff", "select_slots", "slot_rates"]


def __getattr__(name: str) -> Any:
    # The only name here that needs transformers.
    if name == "MemoryFinetuning":
        from memlayers.finetuning.trainer_callback import MemoryFinetuning  # it needs transformers

        return MemoryFinetuning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
