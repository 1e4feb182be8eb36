"""noise: how much the seed alone changes a result. Every other claim is measured by it."""

from memlayers.experiments.experiment import Experiment, Found, Run, Table
from memlayers.experiments.points import pooled_noise
from memlayers.experiments.scales import Scale


def groups(scale: Scale) -> dict[str, list[Run]]:
    """Runs that differ in their seeds alone, by what they are."""
    models = {f"{scale.layers} layers": (), f"{scale.layers} layers + memory": (scale.layer,)}
    return {
        name: [Run(name, scale.run(*layers, seed=seed), name, seed) for seed in range(scale.noise_seeds)]
        for name, layers in models.items()
    }


def noise_of(scale: Scale, found: Found) -> float | None:
    """Standard deviation of a run's perplexity over seeds, as a share of it; None if it was not measured."""
    return pooled_noise([[found(run.config) for run in runs] for runs in groups(scale).values()])


def _runs(scale: Scale, found: Found) -> list[Run]:
    return [run for runs in groups(scale).values() for run in runs]


def _tables(scale: Scale, found: Found) -> list[Table]:
    rows = []
    for name, runs in groups(scale).items():
        sigma = pooled_noise([[found(run.config) for run in runs]])
        rows.append([name, "-" if sigma is None else f"{100 * sigma:.2f} %"])
    pooled = noise_of(scale, found)
    rows.append(["pooled", "-" if pooled is None else f"{100 * pooled:.2f} %"])
    return [Table("Standard deviation of perplexity over seeds", ["model", "as a share"], rows)]


NOISE = Experiment(
    name="noise",
    question="How far apart are two runs that differ in their seeds alone?",
    x_label="seed",
    runs=_runs,
    tables=_tables,
)
