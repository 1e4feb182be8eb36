"""UsageMetric: the figures of a UsageMeter as a metric of torchmetrics, for Lightning and for a MetricCollection."""

import copy
import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from memlayers.layer import MemoryLayer
from memlayers.usage import UsageMeter, report_of

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "memlayers.usage_metric needs torchmetrics: pip install torchmetrics", name="torchmetrics"
    ) from error

_numbers = itertools.count()


class _MeterOfOneMode(UsageMeter):
    """Forgets what it heard while the layer was in training once it is called in evaluation, and the reverse."""

    def __init__(self, layer: MemoryLayer):
        super().__init__(layer)
        self._training = layer.training

    def _before_layer(self, layer: MemoryLayer, args: tuple, kwargs: dict) -> None:
        if layer.training != self._training:
            self._training = layer.training
            for total in self.state_dict().values():
                total.zero_()
        super()._before_layer(layer, args, kwargs)


class UsageMetric(Metric):
    """How one memory uses its slots, counted while its model is called.

        usage = UsageMetric(memory)
        for batch in loader:
            model(**batch)
            usage.update()
        usage.compute()["kl"]

    It listens as a `UsageMeter` does, from its beginning on; `usage.meter.detach()` ends that. `update` counts what it
    has heard since the last one, whatever its arguments are: so it may stand in a `MetricCollection`, and a call of it
    gives the figures of a batch. What was heard in training and not counted is forgotten in evaluation, and the
    reverse: one that is updated in validation alone counts validation alone. States are summed over processes.

    Args:
        layer: the memory to listen to, also one of a model.
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, layer: MemoryLayer, **kwargs: Any):
        super().__init__(**kwargs)
        self.meter = _MeterOfOneMode(layer).attach()
        self._totals = [*self.meter.state_dict()]
        for name, total in self.meter.state_dict().items():
            self.add_state(name, torch.zeros_like(total), dist_reduce_fx="sum")
        # A MetricCollection takes metrics of equal states for one: those of two memories are, before the first token.
        self.add_state("number", torch.tensor(next(_numbers)), dist_reduce_fx="max")

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Counts what was heard since the last time."""
        for name, total in self.meter.state_dict().items():
            held = getattr(self, name)
            held += total.to(held.device)
        self.meter.reset()

    def compute(self) -> dict[str, Tensor]:
        """The figures of `UsageFigures` over all heads. Raises `ValueError` if no token was counted."""
        overall = report_of({name: getattr(self, name) for name in self._totals}).overall
        return {name: torch.tensor(value, device=self.device) for name, value in dataclasses.asdict(overall).items()}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A point a figure, of `val` or of `compute`; returns figure and axes of matplotlib."""
        return self._plot(val, ax)

    def __deepcopy__(self, memo: dict[int, Any]) -> "UsageMetric":
        """Of `clone`, too: listens to the same memory, or to the copy of it that was made before."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        state = {name: value for name, value in self.__getstate__().items() if name != "meter"}
        twin.__setstate__(copy.deepcopy(state, memo))
        layer = self.meter.layer
        twin.meter = _MeterOfOneMode(memo.get(id(layer), layer)).attach()
        return twin
