"""doctor: says at once when a memory is silently not reached, not trained, or not used.

    report = doctor(model, batch, optimizer=optimizer)
    print(report)
    report.raise_for_failures()

`MemoryAlarms` (needs `transformers`) watches the same while a `Trainer` trains.

subjects    the memories of a model, and what stands beside them
aside       everything that an examination changes, put back as it was
watch       what a pass through the model does to each memory
collapse    whether the slots that are read are as many as the tokens allow
passing     checks of that pass: reached, neighbours, usage, output, gradients
stepping    checks of the optimizers, and of a step of theirs
examine     `doctor`, which does all this
report      what it found
alarms      `MemoryWarning`, and the checks of a run in progress
callback    `MemoryAlarms`
"""

from typing import TYPE_CHECKING, Any

from memlayers.diagnosis.alarms import MemoryWarning
from memlayers.diagnosis.examine import doctor
from memlayers.diagnosis.report import DoctorError, Finding, Report

if TYPE_CHECKING:
    from memlayers.diagnosis.callback import MemoryAlarms

__all__ = ["DoctorError", "Finding", "MemoryAlarms", "MemoryWarning", "Report", "doctor"]


def __getattr__(name: str) -> Any:
    # The only name here that needs transformers.
    if name == "MemoryAlarms":
        from memlayers.diagnosis.callback import MemoryAlarms

        return MemoryAlarms
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
