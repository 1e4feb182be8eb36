"""size: more slots, with and without BatchNorm of the query (the paper's Table 2)."""

import itertools
from collections.abc import Mapping
from typing import Any

from memlayers.experiments.experiment import Claim, Experiment, Found, Run, Table
from memlayers.experiments.points import Points, is_below, versus
from memlayers.experiments.scales import Scale
from memlayers.lm.config import RunConfig

NORMS = {"batch": "BatchNorm", "none": "no BatchNorm"}
PLAIN = "no memory"


def _name(subkeys: int, norm: str, recipe: str) -> str:
    return f"{subkeys**2:,} slots, {NORMS[norm]}{recipe}"


def _runs(scale: Scale, found: Found) -> list[Run]:
    runs = [Run(PLAIN, scale.run(seed=seed), PLAIN) for seed in range(scale.seeds)]
    recipes: dict[str, dict[str, Any]] = {"": dict(scale.paper_recipe), ", default": {}}
    for (recipe, fields), norm, subkeys in itertools.product(recipes.items(), NORMS, scale.subkeys):
        if recipe and (norm == "none" or not scale.paper_recipe):  # the scale's own memory: with BatchNorm alone
            continue
        memory = {**fields, "memory.num_subkeys": subkeys, "memory.query_norm": norm}
        name, series = _name(subkeys, norm, recipe), f"{NORMS[norm]}{recipe}"
        runs += [
            Run(name, scale.run(scale.layer, seed=seed, fields=memory), series, subkeys**2)
            for seed in range(scale.seeds)
        ]
    return runs


def _claims(scale: Scale, points: Points) -> list[Claim]:
    rows = [points[_name(subkeys, "batch", "")] for subkeys in scale.subkeys]
    falls = [is_below(larger, smaller) for smaller, larger in itertools.pairwise(rows)]
    steps = ", ".join(versus(larger, smaller) for smaller, larger in itertools.pairwise(rows))
    largest, bare = rows[-1], points[_name(scale.subkeys[-1], "none", "")]
    ratio = None if largest.usage is None or not bare.usage else largest.usage / bare.usage
    claims = [
        Claim(f"Perplexity falls with every step in size (with BatchNorm: {steps}).", _all(falls)),
        Claim(
            f"At {scale.subkeys[-1] ** 2:,} slots BatchNorm lowers perplexity ({versus(largest, bare)}).",
            is_below(largest, bare),
        ),
    ]
    text = "not known yet" if ratio is None else f"{ratio:.2f} times"
    claims.append(
        Claim(
            f"There usage with BatchNorm is at least 1.5 times that without ({text}).",
            None if ratio is None else ratio >= 1.5,
        )
    )
    return claims


def _all(results: list[bool | None]) -> bool | None:
    return False if False in results else None if None in results else True


def _speeds(scale: Scale) -> list[dict[str, RunConfig]]:
    sizes = {
        _name(subkeys, "batch", ""): scale.run(
            scale.layer, fields={**scale.paper_recipe, "memory.num_subkeys": subkeys}
        )
        for subkeys in scale.subkeys
    }
    return [{PLAIN: scale.run(), **sizes}]


def _speed_claims(scale: Scale, found: Found, speeds: Mapping[str, Any]) -> list[Claim]:
    rates = [speeds["models"][_name(subkeys, "batch", "")]["prefill_words_per_s"] for subkeys in scale.subkeys]
    within = min(rates) >= 0.9 * max(rates)
    return [Claim(f"Inference speed stays within 10 % at all sizes ({min(rates) / max(rates):.2f}).", within)]


SIZE = Experiment(
    name="size",
    question="Does perplexity fall as the memory grows, and what does BatchNorm of the query do for its usage?",
    paper=Table(
        "The paper's Table 2 (6 layers, d = 1024; without a memory: 23.0)",
        ["slots", "16k", "65k", "147k", "262k", "590k", "1M"],
        [
            ["perplexity, no BN", "22.8", "21.7", "20.9", "20.5", "20.0", "19.8"],
            ["perplexity, BN", "23.0", "21.9", "20.7", "19.8", "18.7", "18.0"],
            ["usage %, no BN", "100", "99.0", "83.8", "64.4", "38.0", "25.8"],
            ["usage %, BN", "100", "100.0", "99.6", "97.9", "90.3", "80.3"],
            ["KL, no BN", "0.56", "0.69", "0.94", "1.20", "1.70", "2.06"],
            ["KL, BN", "0.56", "0.58", "0.65", "0.68", "0.83", "0.95"],
        ],
    ),
    x_label="slots",
    log_x=True,
    runs=_runs,
    claims=_claims,
    speeds=_speeds,
    speed_claims=_speed_claims,
)
