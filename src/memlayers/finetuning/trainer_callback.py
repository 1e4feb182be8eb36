"""MemoryFinetuning: chosen rows, and a look at the labels, in `transformers.Trainer`."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from memlayers.diagnosis.alarms import MemoryWarning
from memlayers.distributed.agreement import Ranks
from memlayers.finetuning.counts import SlotCounts
from memlayers.finetuning.facts import faults_of_facts
from memlayers.finetuning.select import Method, require_method, select_slots
from memlayers.optim.table_owner import TableOwner
from memlayers.values import ValueTable

_LOOKS = 8  # batches whose labels are looked at


class MemoryFinetuning(TrainerCallback):
    """Has each step of a `Trainer` move only the rows that its batch reads and old text does not.

        Trainer(model, ..., callbacks=[MemoryFinetuning(counts, slots=500)])

    What a batch reads is counted while it trains, over all its micro-batches and in all processes, at no further pass
    through the model; a model that is compiled runs as it was written meanwhile. With ``rows`` the choice is made once
    instead, and a run that is resumed goes on with the one of its optimizer's state.

    It also looks at the first batches, and warns once (`MemoryWarning`) where the loss covers questions as well as
    answers, or where short texts are packed so that they see each other: facts are not learned then.

    Args:
        counts: of the background (`SlotCounts`).
        slots: as in `select_slots`, and so is ``method``.
        rows: in their place, what `select_slots` returned, for the whole run.

    Raises:
        ValueError: neither counts nor rows, or both; a wrong method or number of slots. When training begins: an
            optimizer that trains no table by rows.
    """

    def __init__(
        self,
        counts: SlotCounts | None = None,
        *,
        method: Method = "tfidf",
        slots: int | None = None,
        rows: Mapping[ValueTable, Tensor] | None = None,
    ):
        if (counts is None) == (rows is None):
            raise ValueError("either counts of background text must be given, or rows that were chosen, and not both")
        if rows is None:
            require_method(method, slots, counts)
        elif slots is not None:
            raise ValueError(f"slots must be None with rows, which were chosen already, got {slots}")
        self.counts, self.method, self.slots, self.rows = counts, method, slots, rows
        self._new: SlotCounts | None = None
        self._hook: RemovableHandle | None = None
        self._looks, self._said = 0, set[str]()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.detach()  # of a training that was cut off
        owner = _owner(optimizer)
        config = getattr(model, "config", None)
        start, end = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
        # The end of a text says that another follows only where texts have no beginning of their own.
        self._starts = [one for one in (end if start is None else start,) if isinstance(one, int)]
        self._looks, self._said = 0, set()
        self._hook = model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        if self.rows is None:
            self._new = SlotCounts(model).attach()
        elif owner.chosen_rows is None or not state.global_step:  # a run that is resumed has its own
            owner.choose_rows(self.rows)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._new is not None:  # an evaluation reads, too
            self._new.reset()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._new is None:
            return
        if (ranks := Ranks.of()) is not None:
            for reads_S in self._new.reads.values():
                ranks.reduce_(reads_S)
        rows = select_slots(model, self.counts, self._new, method=self.method, slots=self.slots)
        _owner(optimizer).choose_rows(rows)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Stop listening."""
        if self._new is not None:
            self._new.detach()
            self._new = None
        self._end_looking()

    def _end_looking(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not model.training:
            return
        self._looks += 1
        for kind, message in faults_of_facts(kwargs, self._starts).items():
            if kind not in self._said:
                self._said.add(kind)
                warnings.warn(message, MemoryWarning, stacklevel=2)
        if self._looks >= _LOOKS:
            self._end_looking()


def _owner(optimizer: Any) -> TableOwner:
    """The optimizer itself: accelerate puts another around it."""
    while not isinstance(optimizer, TableOwner) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, TableOwner) or not optimizer.tables:
        raise ValueError(
            f"the optimizer must train value tables by rows (MemoryAdamW, or a row optimizer), got a "
            f"{type(optimizer).__name__} without"
        )
    return optimizer
