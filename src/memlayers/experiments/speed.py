"""speed: one layer against slots, heads, rows and widths, with product and flat keys, beside the dense FFN.

No training: a layer of random weights reads random tokens, in turn with the feed-forward network of the same width.
"""

from collections.abc import Mapping
from typing import Any

from memlayers.config import MemoryConfig
from memlayers.experiments.experiment import Claim, Experiment, Found, Table
from memlayers.experiments.scales import Scale

BASE = {"dim": 1024, "value_dim": 256, "heads": 4, "topk": 32, "num_subkeys": 512, "query_dim": 128}
SUBKEYS = (128, 256, 384, 512, 768, 1024, 2048)
FLAT_MOST = 1024  # sub-keys: all 1024 ** 2 keys of each head are compared
READS = ((1, 32), (2, 32), (4, 8), (4, 16), (8, 32), (4, 64))
WIDTHS = (256, 512, 2048)


def _name(keys: str, subkeys: int) -> str:
    return f"{subkeys**2:,} slots, {keys} keys"


def layers(scale: Scale) -> dict[str, MemoryConfig]:
    """The layers that are measured; all that a name does not say is as in `BASE`."""
    fields: dict[str, dict[str, Any]] = {
        _name(keys, subkeys): {"num_subkeys": subkeys, "keys": keys}
        for keys in ("product", "flat")
        for subkeys in SUBKEYS
        if keys == "product" or subkeys <= FLAT_MOST
    }
    fields |= {f"H = {heads}, K = {topk}": {"heads": heads, "topk": topk} for heads, topk in READS}
    fields |= {f"d = {dim}": {"dim": dim} for dim in WIDTHS}
    return {name: MemoryConfig(**{**BASE, **changes}) for name, changes in fields.items()}


def _claims(scale: Scale, found: Found, speeds: Mapping[str, Any]) -> list[Claim]:
    measured = speeds["layers"]
    product = [measured[_name("product", subkeys)]["memory"] for subkeys in SUBKEYS]
    ratio = measured[_name("flat", FLAT_MOST)]["memory"] / measured[_name("product", FLAT_MOST)]["memory"]
    return [
        Claim(
            f"From {SUBKEYS[0] ** 2:,} to {SUBKEYS[-1] ** 2:,} slots a layer with product keys takes at most twice as "
            f"long ({max(product) / min(product):.2f} times).",
            max(product) <= 2 * min(product),
        ),
        Claim(f"At {FLAT_MOST**2:,} slots flat keys take 20 times as long or more ({ratio:.1f}).", ratio >= 20),
    ]


SPEED = Experiment(
    name="speed",
    question="How long does one layer take, against slots, heads, rows and widths, and against the FFN it replaces?",
    paper=Table(
        "The paper's Table 4 has whole models (thousand words a second)",
        ["slots", "16k", "65k", "147k", "262k", "590k", "1M"],
        [
            ["flat", "35.0", "28.5", "13.9", "7.7", "4.7", "1.2"],
            ["product", "35.8", "36.7", "36.4", "36.3", "36.2", "35.7"],
        ],
    ),
    x_label="",
    layers=layers,
    speed_claims=_claims,
)
