"""flat: product keys against flat keys (the paper's Table 4)."""

from collections.abc import Mapping
from typing import Any

from memlayers.experiments.experiment import Claim, Experiment, Found, Run, Table
from memlayers.experiments.points import Points, is_below, versus
from memlayers.experiments.scales import Scale
from memlayers.lm.config import RunConfig

SPEED_SUBKEYS = (128, 256, 384, 512, 768, 1024)
KINDS = ("product", "flat")


def _name(keys: str, subkeys: int) -> str:
    return f"{subkeys**2:,} slots, {keys} keys"


def _runs(scale: Scale, found: Found) -> list[Run]:
    runs = []
    for keys in KINDS:
        for subkeys in scale.flat_subkeys:
            fields = {**scale.paper_recipe, "memory.num_subkeys": subkeys, "memory.keys": keys}
            for seed in range(scale.seeds):
                config = scale.run(scale.layer, tokens=scale.flat_tokens, seed=seed, fields=fields)
                runs.append(Run(_name(keys, subkeys), config, f"{keys} keys", subkeys**2))
    return runs


def _claims(scale: Scale, points: Points) -> list[Claim]:
    claims = []
    for subkeys in scale.flat_subkeys:
        product, flat = (points[_name(keys, subkeys)] for keys in KINDS)
        known = product.usage is not None and flat.usage is not None
        shown = f"{product.usage:.1f} % against {flat.usage:.1f} %" if known else "not known yet"
        claims += [
            Claim(
                f"At {subkeys**2:,} slots product keys use more of them ({shown}).",
                product.usage > flat.usage if known else None,  # type: ignore[operator]  # both are known
            ),
            Claim(f"There perplexity is lower with them ({versus(product, flat)}).", is_below(product, flat)),
        ]
    return claims


def _wide(scale: Scale, keys: str, subkeys: int) -> RunConfig:
    """A model of the paper's width, 6 layers with a memory in the fifth; its speed is measured, it is not trained."""
    fields = {"model.dim": 1024, "model.heads": 8, "memory.heads": 4, "memory.topk": 32, "memory.query_dim": 128}
    return scale.run(5, layers=6, fields={**fields, "memory.num_subkeys": subkeys, "memory.keys": keys})


def _speeds(scale: Scale) -> list[dict[str, RunConfig]]:
    return [{_name(keys, subkeys): _wide(scale, keys, subkeys) for keys in KINDS} for subkeys in SPEED_SUBKEYS]


def _speed_claims(scale: Scale, found: Found, speeds: Mapping[str, Any]) -> list[Claim]:
    product, flat = (
        [speeds["models"][_name(keys, subkeys)]["prefill_words_per_s"] for subkeys in SPEED_SUBKEYS] for keys in KINDS
    )
    ratio = product[-1] / flat[-1]
    return [
        Claim(
            f"Product keys stay within 10 % of their best speed up to {SPEED_SUBKEYS[-1] ** 2:,} slots "
            f"({min(product) / max(product):.2f}).",
            min(product) >= 0.9 * max(product),
        ),
        Claim(f"There they are at least 20 times as fast as flat keys ({ratio:.1f}).", ratio >= 20),
    ]


FLAT = Experiment(
    name="flat",
    question="Do product keys use more slots than flat keys?",
    paper=Table(
        "The paper's Table 4 (speed: inference, thousand words a second)",
        ["slots", "16k", "65k", "147k", "262k", "590k", "1M"],
        [
            ["perplexity, flat", "23.2", "22.6", "22.1", "-", "-", "-"],
            ["perplexity, product", "23.0", "21.9", "20.7", "19.8", "18.7", "18.0"],
            ["usage %, flat", "19.6", "13.6", "10.1", "-", "-", "-"],
            ["speed, flat", "35.0", "28.5", "13.9", "7.7", "4.7", "1.2"],
            ["speed, product", "35.8", "36.7", "36.4", "36.3", "36.2", "35.7"],
        ],
    ),
    x_label="slots",
    log_x=True,
    runs=_runs,
    claims=_claims,
    speeds=_speeds,
    measures_training=False,
    speed_claims=_speed_claims,
)
