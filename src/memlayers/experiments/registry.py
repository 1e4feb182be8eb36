"""All experiments by name."""

from memlayers.checks import instead
from memlayers.experiments.depth import DEPTH
from memlayers.experiments.equivalent import EQUIVALENT
from memlayers.experiments.experiment import Experiment
from memlayers.experiments.flat import FLAT
from memlayers.experiments.heads_k import HEADS_K
from memlayers.experiments.noise import NOISE
from memlayers.experiments.position import POSITION
from memlayers.experiments.size import SIZE
from memlayers.experiments.speed import SPEED
from memlayers.experiments.updates import UPDATES

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one for one in (NOISE, DEPTH, SIZE, POSITION, HEADS_K, FLAT, UPDATES, EQUIVALENT, SPEED)
}


def experiment(name: str) -> Experiment:
    """The experiment of that name. Raises `ValueError` for an unknown one."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one that is known, got {name!r}; {instead(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]
