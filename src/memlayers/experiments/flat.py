"""flat: product keys against flat keys (the paper's Table 4)."""

from memlayers.experiments.experiment import Claim, Experiment, Found, Run, Table
from memlayers.experiments.points import Points, is_below, versus
from memlayers.experiments.scales import Scale

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
)
