"""heads-k: how many heads, and how many rows each reads (a plot in the paper).

Letters: H heads, K rows a head reads.
"""

from memlayers.experiments.experiment import Claim, Experiment, Found, Run, Table
from memlayers.experiments.points import Points
from memlayers.experiments.scales import Scale

HEADS = (1, 2, 4, 8)


def _name(heads: int, topk: int) -> str:
    return f"H = {heads}, K = {topk}"


def _runs(scale: Scale, found: Found) -> list[Run]:
    runs = []
    for reads in (scale.reads // 2, scale.reads, scale.reads * 2):
        for heads in HEADS:
            fields = {**scale.paper_recipe, "memory.heads": heads, "memory.topk": reads // heads}
            # Equal H * K is what is claimed; the grid around it is to look at.
            for seed in range(scale.seeds if reads == scale.reads else 1):
                config = scale.run(scale.layer, seed=seed, fields=fields)
                runs.append(Run(_name(heads, reads // heads), config, f"H · K = {reads}", heads))
    return runs


def _claims(scale: Scale, points: Points) -> list[Claim]:
    def usage(reads: int) -> list[float]:
        rows = [points[_name(heads, reads // heads)].usage for heads in HEADS]
        return [figure for figure in rows if figure is not None]

    equal = usage(scale.reads)
    is_known = len(equal) == len(HEADS)
    shown = ", ".join(f"{figure:.1f}" for figure in equal) or "not known yet"
    fewer, more = usage(scale.reads // 2), usage(2 * scale.reads)
    rises = None
    if len(fewer) == len(more) == len(HEADS):
        rises = all(one < other for one, other in zip(fewer, more, strict=True))
    return [
        Claim(
            f"Equal H · K = {scale.reads} gives usages within 10 % of each other ({shown}).",
            max(equal) <= 1.1 * min(equal) if is_known else None,
        ),
        Claim("Usage rises with H · K at every number of heads.", rises),
    ]


HEADS_K = Experiment(
    name="heads-k",
    question="Is it H · K alone that decides how many slots are used?",
    paper=Table(
        "The paper's plot, in words",
        ["H, K", "1, 64", "2, 32", "4, 16", "8, 8"],
        [["usage %, about", "70", "70", "70", "70"], ["perplexity, about", "20.5", "20.5", "20.5", "20.5"]],
    ),
    x_label="heads",
    log_x=True,
    runs=_runs,
    claims=_claims,
)
