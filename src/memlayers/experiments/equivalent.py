"""equivalent: how large a dense model would have to be to equal a memory model.

A power law, perplexity = a · size^-b, goes through dense models of several sizes; size is parameters without
embeddings.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from memlayers.experiments.experiment import Experiment, Found, Run, Table
from memlayers.experiments.noise import noise_of
from memlayers.experiments.points import point
from memlayers.experiments.scales import Scale
from memlayers.lm.config import RunConfig

DENSE = "dense"


class PowerLaw(NamedTuple):
    """ln y = intercept + slope · ln x, fitted to some points."""

    intercept: float
    slope: float
    scatter: float  # standard deviation of a point's ln y: of the residuals, or as it was known before, the larger
    mean: float  # of ln x
    spread: float  # sum of the squares of ln x around it
    sizes: int

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float], noise: float) -> "PowerLaw":
        """The least squares of at least three points; `noise` is what is known of a point's error, as a share."""
        us, vs = [math.log(x) for x in xs], [math.log(y) for y in ys]
        mean = statistics.fmean(us)
        spread = sum((u - mean) ** 2 for u in us)
        slope = sum((u - mean) * v for u, v in zip(us, vs, strict=True)) / spread
        intercept = statistics.fmean(vs) - slope * mean
        residual = sum((v - intercept - slope * u) ** 2 for u, v in zip(us, vs, strict=True))
        scatter = max(noise, math.sqrt(residual / (len(us) - 2)))
        return cls(intercept, slope, scatter, mean, spread, len(us))

    def inverse(self, y: float, error: float) -> tuple[float, float]:
        """The x at which the law is y, and the factor by which it may be off: one standard error of ln x."""
        u = (math.log(y) - self.intercept) / self.slope
        of_the_law = self.scatter**2 * (1 / self.sizes + (u - self.mean) ** 2 / self.spread)
        return math.exp(u), math.exp(math.sqrt(error**2 + of_the_law) / abs(self.slope))


def _dense(scale: Scale) -> dict[str, list[RunConfig]]:
    """The runs of each dense model: the seeds that the memories have, for a seed makes all models better or worse."""
    return {
        f"{layers} layers of {dim}": [
            scale.run(
                layers=layers,
                seed=seed,
                fields={"model.dim": dim, "model.heads": heads, "training.learning_rate": rate},
            )
            for seed in range(scale.seeds)
        ]
        for layers, dim, heads, rate in scale.dense_sizes
    }


def _memories(scale: Scale) -> dict[str, tuple[int, ...]]:
    several = {f"{scale.layers} layers + {len(places)} memories": places for places in scale.several}
    return {f"{scale.layers} layers + 1 memory": (scale.layer,), **several}


def size(config: RunConfig) -> int:
    """Parameters of a dense model's blocks, without norms and biases."""
    return 12 * config.model.layers * config.model.dim**2


def _runs(scale: Scale, found: Found) -> list[Run]:
    runs = [Run(name, config, DENSE, size(config)) for name, configs in _dense(scale).items() for config in configs]
    for name, places in _memories(scale).items():
        runs += [Run(name, scale.run(*places, seed=seed), name) for seed in range(scale.seeds)]
    return runs


def _tables(scale: Scale, found: Found) -> list[Table]:
    noise = noise_of(scale, found) or 0.0
    points = {size(runs[0]): point([*map(found, runs)], None).perplexity for runs in _dense(scale).values()}
    known = {number: perplexity for number, perplexity in points.items() if perplexity is not None}
    head = ["model", "equals a dense model of", "from", "to", "times its own N layers"]
    if len(known) < 4:
        return [Table("Dense equivalents: four dense sizes are needed, which are not run yet", head, [])]
    law = PowerLaw.through([*known], [*known.values()], noise / math.sqrt(scale.seeds))
    own = size(scale.base)
    rows = []
    for name, places in _memories(scale).items():
        one = point([found(scale.run(*places, seed=seed)) for seed in range(scale.seeds)], noise)
        if one.perplexity is None:
            rows.append([name, "-", "-", "-", "-"])
            continue
        equal, factor = law.inverse(one.perplexity, (one.error or 0.0) / one.perplexity)
        beyond = " (extrapolated)" if not min(known) <= equal <= max(known) else ""
        sizes = [f"{number / 1e6:,.2f} M" for number in (equal, equal / factor, equal * factor)]
        rows.append([name, f"{sizes[0]}{beyond}", *sizes[1:], f"{equal / own:.2f}"])
    title = (
        f"Dense equivalents, in parameters without embeddings, from a power law with exponent {law.slope:.3f} through "
        f"{law.sizes} sizes (scatter {100 * law.scatter:.2f} %); from and to are one standard error"
    )
    return [Table(title, head, rows)]


EQUIVALENT = Experiment(
    name="equivalent",
    question="How large is the dense model that equals a memory model?",
    x_label="parameters without embeddings",
    log_x=True,
    runs=_runs,
    tables=_tables,
)
