"""updates: what trains the values, and at which rate."""

import math

from memlayers.experiments.experiment import Claim, Experiment, Found, Run
from memlayers.experiments.points import Points, best_of, is_below, versus
from memlayers.experiments.scales import Scale
from memlayers.lm.config import RunConfig

RULES = {"rows": "row Adam", "dense": "dense Adam", "sparse": "SparseAdam"}


def _name(rule: str, rate: float) -> str:
    return f"{RULES[rule]}, values at {rate:g}"


def _runs(scale: Scale, found: Found) -> list[Run]:
    runs = []
    for rule, label in RULES.items():
        for rate in scale.value_rates:
            fields = {"training.value_optimizer": rule, "training.value_learning_rate": rate}
            for seed in range(scale.seeds):
                runs.append(Run(_name(rule, rate), scale.run(scale.layer, seed=seed, fields=fields), label, rate))
    return runs


def _best(scale: Scale, points: Points, rule: str) -> float | None:
    """The rate of the lowest perplexity; None until runs at all rates ended, and where none of them has a result."""
    found = {rate: points[_name(rule, rate)] for rate in scale.value_rates}
    return best_of({rate: math.inf if one.failed and not one.runs else one.perplexity for rate, one in found.items()})


def _claims(scale: Scale, points: Points) -> list[Claim]:
    best = {rule: _best(scale, points, rule) for rule in RULES}
    rates = {rule: "not known yet" if rate is None else f"{rate:g}" for rule, rate in best.items()}
    at_best = {rule: None if rate is None else points[_name(rule, rate)] for rule, rate in best.items()}
    claims = []
    for rule in ("dense", "sparse"):
        rows, other = at_best["rows"], at_best[rule]
        known = rows is not None and other is not None and rows.error is not None and other.error is not None
        claims.append(
            Claim(
                f"Row Adam is no worse than {RULES[rule]}, each at its best rate for the values "
                f"({rates['rows']} and {rates[rule]}): {versus(rows, other)}.",
                not is_below(other, rows) if known else None,
            )
        )
    edges = min(scale.value_rates), max(scale.value_rates)
    claims.append(
        Claim(
            f"The best rate of the values for row Adam ({rates['rows']}) is not at the edge.",
            None if best["rows"] is None else best["rows"] not in edges,
        )
    )
    return claims


def _speeds(scale: Scale) -> list[dict[str, RunConfig]]:
    return [{label: scale.run(scale.layer, fields={"training.value_optimizer": rule}) for rule, label in RULES.items()}]


UPDATES = Experiment(
    name="updates",
    question="Does it matter whether rows that were not read are updated, and how fast values are trained?",
    x_label="learning rate of the values",
    log_x=True,
    runs=_runs,
    claims=_claims,
    speeds=_speeds,
)
