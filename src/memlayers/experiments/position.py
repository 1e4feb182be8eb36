"""position: which layer the memory takes the place of (the paper's Table 3)."""

from memlayers.experiments.experiment import Claim, Experiment, Found, Run, Table
from memlayers.experiments.points import Points, is_below, versus
from memlayers.experiments.scales import Scale


def _name(layer: int) -> str:
    return f"layer {layer}"


def _runs(scale: Scale, found: Found) -> list[Run]:
    layers = scale.position_layers
    return [
        Run(_name(layer), scale.run(layer, layers=layers, seed=seed, fields=scale.paper_recipe), "one memory", layer)
        for layer in range(1, layers + 1)
        for seed in range(scale.seeds)
    ]


def _claims(scale: Scale, points: Points) -> list[Claim]:
    rows = {layer: points[_name(layer)] for layer in range(1, scale.position_layers + 1)}
    known = {layer: one.perplexity for layer, one in rows.items() if one.perplexity is not None}
    first, others = rows[1], [one for layer, one in rows.items() if layer > 1]
    worse = [is_below(one, first) for one in others]
    divergences = [one.kl for one in others if one.kl is not None]
    claims = [
        Claim("The first layer is the worst place.", True if all(worse) else False if False in worse else None),
        Claim(
            "KL is highest there.",
            None if first.kl is None or len(divergences) < len(others) else first.kl > max(divergences),
        ),
    ]
    if len(known) == len(rows):
        best = min(known, key=known.__getitem__)
        middle = len(rows) / 2 < best < len(rows)
        shown = f"layer {best}: {versus(rows[best], first)}"
        sentence = f"The best place is in the second half, before the last layer ({shown})."
        claims.append(Claim(sentence, middle))
    return claims


POSITION = Experiment(
    name="position",
    question="In which layer is a memory best?",
    paper=Table(
        "The paper's Table 3 (6 layers, 262k slots)",
        ["layer", "1", "2", "3", "4", "5", "6"],
        [
            ["perplexity", "21.5", "20.7", "20.4", "20.1", "19.8", "20.3"],
            ["usage %", "100.0", "100.0", "98.3", "97.1", "97.9", "96.9"],
            ["KL", "2.23", "0.95", "0.74", "0.71", "0.68", "1.08"],
        ],
    ),
    x_label="layer of the memory",
    runs=_runs,
    claims=_claims,
)
