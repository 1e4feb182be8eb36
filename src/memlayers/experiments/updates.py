"""updates: what trains the values, and at which rate."""

from memlayers.experiments.experiment import Claim, Experiment, Found, Run
from memlayers.experiments.points import Points, is_below, versus
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


def _claims(scale: Scale, points: Points) -> list[Claim]:
    best = {}
    for rule in RULES:
        losses = {rate: points[_name(rule, rate)].perplexity for rate in scale.value_rates}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if known:
            best[rule] = min(known, key=known.__getitem__)
    claims = []
    for rule in ("dense", "sparse"):
        if rule in best and "rows" in best:
            rows, other = points[_name("rows", best["rows"])], points[_name(rule, best[rule])]
            worse = is_below(other, rows)
            claims.append(
                Claim(
                    f"Row Adam is no worse than {RULES[rule]}, each at its best rate for the values "
                    f"({best['rows']:g} and {best[rule]:g}): {versus(rows, other)}.",
                    None if rows.error is None or other.error is None else not worse,
                )
            )
    if "rows" in best:
        at_edge = best["rows"] in (min(scale.value_rates), max(scale.value_rates))
        claims.append(Claim(f"The best rate of the values, {best['rows']:g}, is not at the edge.", not at_edge))
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
