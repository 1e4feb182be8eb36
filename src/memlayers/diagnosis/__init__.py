"""doctor: says at once when a memory is silently not reached, not trained, or not used.

    report = doctor(model, batch, optimizer=optimizer)
    print(report)
    report.raise_for_failures()

`MemoryAlarms` (needs `transformers`) watches the same while a `Trainer` trains.

Read `examine` first: it is the examination from top to bottom. A file a question, each a function that returns an
`Answer` (`findings`):

reached      does the model call the memory, and does its loss depend on it?
neighbours   are K slots a head read, all with a weight?
collapse     are slots used, or has the query collapsed?
output       is the output of a sensible size?
gradients    do the parameters get gradients, and which are frozen?
groups       who trains them: owner, groups, weight decay?
written      does a step write the rows that were read, and no others?
loss         what is trained for, and does it train anything?

subjects     the memories of a model, and what stands beside them
watch        records what a pass does to each memory
untouched    puts back everything that an examination changes

alarms             the questions that a run in progress can be asked; `MemoryWarning`
trainer_callback   `MemoryAlarms`
"""

from typing import TYPE_CHECKING, Any

from memlayers.diagnosis.alarms import MemoryWarning
from memlayers.diagnosis.examine import doctor
from memlayers.diagnosis.findings import DoctorError, Finding, Report

if TYPE_CHECKING:
    from memlayers.diagnosis.trainer_callback import MemoryAlarms

__all__ = ["DoctorError", "Finding", "MemoryAlarms", "MemoryWarning", "Report", "doctor"]


def __getattr__(name: str) -> Any:
    # The only name here that needs transformers.
    if name == "MemoryAlarms":
        from memlayers.diagnosis.trainer_callback import MemoryAlarms  # it needs transformers

        return MemoryAlarms
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
