"""depth: layers against memories, each model at its own best rate (the paper's Table 1).

Each model is tried at the same rates; at the best one it is run with other seeds, and then at the large budget.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from memlayers.experiments.experiment import Claim, Experiment, Found, Run, Table
from memlayers.experiments.points import Points, best_of, is_below, loss_at_time, versus
from memlayers.experiments.records import Record
from memlayers.experiments.scales import Scale
from memlayers.lm.config import RunConfig
from memlayers.presentation import perplexity

FIRST_SEED = 1  # of the runs that are reported: seed 0 chose the rate


def models(scale: Scale) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The models by name: layers, and those of them with a memory."""
    n = scale.layers
    found: dict[str, tuple[int, tuple[int, ...]]] = {
        plain(n): (n, ()),
        plain(2 * n): (2 * n, ()),
        with_memories(n, 1): (n, (scale.layer,)),
    }
    found |= {with_memories(n, len(places)): (n, places) for places in scale.several}
    if len(found) < 5:
        found[with_memories(2 * n, 1)] = (2 * n, (2 * scale.layer,))
    return found


def plain(layers: int) -> str:
    return f"{layers} layers"


def with_memories(layers: int, count: int) -> str:
    return f"{layers} layers + {'1 memory' if count == 1 else f'{count} memories'}"


def final(name: str, scale: Scale) -> str:
    return f"{name}, {scale.final_tokens / 1e6:,.0f} M tokens"


def at_rate(scale: Scale, name: str, rate: float, *, seed: int = 0, tokens: int | None = None) -> Run:
    """One run of a model of the experiment."""
    layers, memories = models(scale)[name]
    config = scale.run(*memories, layers=layers, tokens=tokens, seed=seed, fields={"training.learning_rate": rate})
    series = f"{len(memories)} memories" if len(memories) != 1 else "1 memory"
    if tokens not in (None, scale.grid_tokens):
        name, series = final(name, scale), final(series, scale)
    return Run(name, config, series, layers)


def best_rate(scale: Scale, found: Found, name: str) -> float | None:
    """The rate at which a model is best, or None as long as not all were tried, or none gave a model."""
    losses = {}
    for rate in scale.rates:
        record = found(at_rate(scale, name, rate).config)
        if record is None:
            return None
        losses[rate] = math.inf if record["failed"] else record["validation"]["perplexity"]
    return best_of(losses)


def _runs(scale: Scale, found: Found) -> list[Run]:
    runs = []
    for name in models(scale):
        for rate in scale.rates:
            run = at_rate(scale, name, rate)
            runs.append(Run(f"{name}, rate {rate:g}", run.config))  # in a table of their own
    best = {name: best_rate(scale, found, name) for name in models(scale)}
    chosen = {name: rate for name, rate in best.items() if rate is not None}
    for name, rate in chosen.items():
        seeds = range(FIRST_SEED, FIRST_SEED + scale.seeds)
        runs += [at_rate(scale, name, rate, seed=seed) for seed in seeds]
    if scale.final_tokens > scale.grid_tokens:
        for name, rate in chosen.items():
            runs.append(at_rate(scale, name, rate, seed=FIRST_SEED, tokens=scale.final_tokens))
    return runs


def _tables(scale: Scale, found: Found) -> list[Table]:
    rows = []
    for name in models(scale):
        cells = []
        for rate in scale.rates:
            record = found(at_rate(scale, name, rate).config)
            failed = record is not None and record["failed"]
            cells.append(
                "-" if record is None else "diverged" if failed else f"{record['validation']['perplexity']:.2f}"
            )
        best = best_rate(scale, found, name)
        at_edge = best in (min(scale.rates), max(scale.rates))
        rows.append([name, *cells, "-" if best is None else f"{best:g}{' (at the edge)' if at_edge else ''}"])
    head = ["model", *(f"{rate:g}" for rate in scale.rates), "best"]
    return [Table("Validation perplexity at each rate (seed 0)", head, rows)]


def _claims(scale: Scale, points: Points) -> list[Claim]:
    n, claims = scale.layers, []
    names: Mapping[str, str] = {"": ""}
    if scale.final_tokens > scale.grid_tokens:
        names = {"": "", final("", scale): f" after {scale.final_tokens / 1e6:,.0f} M tokens"}
    for suffix, when in names.items():
        base, deep, memory = (points.get(f"{name}{suffix}") for name in (plain(n), plain(2 * n), with_memories(n, 1)))
        claims += [
            Claim(
                f"{2 * n} layers are below {n}{when} ({versus(deep, base)}): depth helps at this budget.",
                is_below(deep, base),
            ),
            Claim(
                f"{n} layers with a memory are below {2 * n} layers without{when} ({versus(memory, deep)}).",
                is_below(memory, deep),
            ),
        ]
        for name, (layers, memories) in models(scale).items():
            if memories and layers == n:
                more = points.get(f"{name}{suffix}")
                claims.append(Claim(f"{name} against {n} layers{when}: {versus(more, base)}.", is_below(more, base)))
    return claims


def _speeds(scale: Scale) -> list[dict[str, RunConfig]]:
    return [{name: at_rate(scale, name, scale.rates[0]).config for name in models(scale)}]


def _speed_claims(scale: Scale, found: Found, speeds: Mapping[str, Any]) -> list[Claim]:
    n = scale.layers
    measured = speeds["models"]
    memory, deep = with_memories(n, 1), plain(2 * n)
    most = with_memories(n, max(len(places) for layers, places in models(scale).values() if layers == n))
    prefill = measured[memory]["ratios"]["prefill_words_per_s"]
    training = measured[most]["ratios"]["training_tokens_per_s"]
    claims = [
        Claim(f"{memory} prefills at 90 % or more of the speed of {n} layers ({100 * prefill:.0f} %).", prefill >= 0.9),
        Claim(f"{most} trains at 90 % or more of the speed of {n} layers ({100 * training:.0f} %).", training >= 0.9),
    ]
    best = {name: best_rate(scale, found, name) for name in (memory, deep)}
    rates = {name: rate for name, rate in best.items() if rate is not None}
    if len(rates) < 2:
        return claims
    budgets = {scale.grid_tokens: range(FIRST_SEED, FIRST_SEED + scale.seeds)}
    budgets.setdefault(scale.final_tokens, range(FIRST_SEED, FIRST_SEED + 1))
    for tokens, seeds in budgets.items():
        pairs = []
        for seed in seeds:
            runs = {
                name: found(at_rate(scale, name, rate, seed=seed, tokens=tokens).config) for name, rate in rates.items()
            }
            pairs.append(_at_equal_time([(run, measured[name]["training_tokens_per_s"]) for name, run in runs.items()]))
        known = [pair for pair in pairs if pair is not None]
        shown = ", ".join(f"{one:.2f} against {other:.2f}" for one, other in known) or "not known yet"
        claims.append(
            Claim(
                f"In every seed {memory} are below {deep} when the first of the two is done with {tokens / 1e6:,.0f} M "
                f"tokens (perplexity {shown}; the learning rate of the other had not fallen to its end then).",
                all(one < other for one, other in known) if len(known) == len(pairs) else None,
            )
        )
    return claims


def _at_equal_time(runs: Sequence[tuple[Record | None, float]]) -> tuple[float, float] | None:
    """Perplexities of two runs when the first of them is done, each with its tokens a second; None if not known."""
    curves = []
    for record, rate in runs:
        if record is None or record["failed"]:
            return None
        curves.append([{**place, "seconds": place["tokens"] / rate} for place in record["curve"]])
    end = min(curve[-1]["seconds"] for curve in curves)
    one, other = (loss_at_time(curve, end) for curve in curves)
    return None if one is None or other is None else (perplexity(one), perplexity(other))


DEPTH = Experiment(
    name="depth",
    question="Are N layers with a memory better than 2N layers without?",
    paper=Table(
        "The paper's Table 1 (test perplexity; N: memories)",
        ["layers", "d=1024, N=0", "N=1", "N=2", "N=3", "d=1600, N=0", "N=1"],
        [
            ["12", "17.7", "15.6", "14.8", "14.5", "15.0", "13.7"],
            ["16", "16.7", "14.9", "14.1", "-", "14.4", "13.2"],
            ["24", "16.0", "14.6", "-", "-", "14.0", "-"],
        ],
    ),
    x_label="layers",
    runs=_runs,
    claims=_claims,
    tables=_tables,
    speeds=_speeds,
    speed_claims=_speed_claims,
)
