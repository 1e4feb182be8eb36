"""MemoryAlarms: the checks of `doctor` that a training run can make of itself, in `transformers.Trainer`."""

import warnings
from typing import Any

from transformers import TrainerCallback

from memlayers.checks import require_int
from memlayers.diagnosis.alarms import MemoryWarning, Monitor
from memlayers.diagnosis.subjects import find_trainable
from memlayers.models.checkpoints import checkpoint_of, holds_adapters_alone


class MemoryAlarms(TrainerCallback):
    """Warns, once for each memory and check, as soon as a memory goes wrong in training.

        Trainer(model, ..., callbacks=[MemoryAlarms()])

    It says when a memory was not called in a step, no row is written, its output is not finite or far off in size, the
    slots of the last `window` tokens have collapsed, the owner of its table is gone, a checkpoint has adapters of PEFT
    and not the memory (`memlayers.models.SaveMemory` saves it), or replicas of it in several processes have drifted
    apart. Alarms are `MemoryWarning`s, not lines of a log: they are shown whatever logging is set to, and
    ``warnings.simplefilter("error", MemoryWarning)`` makes them stop the run. `raised` holds them.

    It looks every `every` steps; in between, everything stays on the device. Raises `ValueError` when the training of a
    model without memories begins.
    """

    def __init__(self, *, every: int = 50, window: int = 4096):
        require_int("every", every, least=1)
        require_int("window", window, least=2)
        self.every = every
        self.window = window
        self.raised: dict[tuple[str, str], str] = {}  # (memory, check) -> message
        self._monitors: list[Monitor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.detach()  # of a training that was cut off
        self.raised = {}
        self._monitors = [Monitor(subject, window=self.window) for subject in find_trainable(model)]
        for monitor in self._monitors:
            monitor.attach()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look_at_checkpoint(args, state)
        self.detach()

    def detach(self) -> None:
        """Stop listening."""
        for monitor in self._monitors:
            monitor.detach()
        self._monitors = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What was saved since the last step (by now all callbacks have seen it), or what the run is resumed from.
        self._look_at_checkpoint(args, state)
        for monitor in self._active():  # before its backward raises
            self._raise(monitor, monitor.owner())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if (state.global_step + 1) % self.every == 0:
            for monitor in self._active():
                monitor.note_rows(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for monitor in self._active():
            self._raise(monitor, monitor.written(optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:  # first, so that no process is stopped before by what it alone found
            for monitor in self._monitors:
                self._raise(monitor, monitor.replicas(optimizer), more="")
        for monitor in self._active():
            monitor.end_step()
            if state.global_step % self.every == 0:
                for look in (monitor.reached, monitor.gate, monitor.output, monitor.usage):
                    self._raise(monitor, look())

    def _active(self) -> list[Monitor]:
        """Those of memories that answer (`set_active`): others are passed by on purpose."""
        return [monitor for monitor in self._monitors if monitor.subject.is_active]

    def _look_at_checkpoint(self, args: Any, state: Any) -> None:
        checkpoint = checkpoint_of(args, state)
        if holds_adapters_alone(checkpoint):
            message = (
                f"{checkpoint} holds the adapters and not the memory: a run that is resumed from it begins with an "
                f"untrained one; add memlayers.models.SaveMemory() to the callbacks"
            )
            for monitor in self._monitors:
                self._raise(monitor, ("saved", message), more="")

    def _raise(
        self,
        monitor: Monitor,
        alarm: tuple[str, str] | None,
        more: str = ". memlayers.doctor(model, batch) says more",
    ) -> None:
        if alarm is None:
            return
        check, message = alarm
        name = monitor.subject.name
        if (name, check) not in self.raised:
            self.raised[name, check] = message
            warnings.warn(f"{name}: {message}{more}", MemoryWarning, stacklevel=2)
