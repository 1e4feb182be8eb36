"""Is K as asked? K distinct hits a head, and all of them arrive at the table with a weight.

Letters: T tokens, H heads, K rows a head reads, M = H * K rows a token reads.
"""

from collections.abc import Iterable

from torch import Tensor

from memlayers.diagnosis.findings import NOT_REACHED, Answer, fails, passed, warns
from memlayers.diagnosis.watch import Watch

NO_WEIGHT = 1e-12  # of the largest weight of a head: no gradient that arrives there is seen beside those of others
MOST_WITHOUT_WEIGHT = 0.05  # share of the weights


def neighbours(watch: Watch) -> Answer:
    if not watch.tokens:
        return NOT_REACHED
    config = watch.subject.layer.config
    distinct = f"{config.heads} x {config.topk} distinct slots a token"
    arrived_THK = [weights_TM.unflatten(-1, (config.heads, config.topk)) for weights_TM in _weights_of_all_rows(watch)]
    # Where the class weighs the slots once more, what it does is told from what the search gave.
    zero = _zeros(watch.weights_THK if watch.reads_otherwise else arrived_THK)
    wrong = [*_wrong_searches(watch), *_wrong_reads(watch)]
    if zero > MOST_WITHOUT_WEIGHT:
        wrong.append(f"{zero:.1%} of the weights of neighbours are zero")
    if wrong:
        return fails(
            f"K is ignored: {'; '.join(dict.fromkeys(wrong))}",
            "see what lies between config.topk and the read of the table",
        )
    if zero:
        return warns(
            f"{distinct}, but {zero:.2%} of their weights are zero: scores are too far apart",
            "lower the learning rate of query and keys, or normalise the query",
        )
    if watch.reads_otherwise and (zero := _zeros(arrived_THK)) > MOST_WITHOUT_WEIGHT:
        return warns(
            f"{distinct} with a weight, {zero:.1%} of which `read` sets to zero",
            "nothing to do if that is meant, as where a relu chooses experts",
        )
    return passed(f"{distinct}, all with a weight")


def _wrong_searches(watch: Watch) -> Iterable[str]:
    config = watch.subject.layer.config
    asked = getattr(watch.subject.layer.keys, "topk", config.topk)
    if asked != config.topk:
        yield f"its keys search {asked} slots, the configuration says topk = {config.topk}"
    for slots_THK in watch.slots_THK:
        heads, topk = slots_THK.shape[1:]
        if (heads, topk) != (config.heads, config.topk):
            yield f"a search finds {heads} x {topk} slots instead of {config.heads} x {config.topk}"
        elif topk > 1:
            sorted_THK = slots_THK.sort(-1).values
            repeated = float((sorted_THK[..., 1:] == sorted_THK[..., :-1]).float().mean())
            if repeated > 0:
                yield f"a head finds the same slot twice ({repeated:.1%} of neighbours)"


def _wrong_reads(watch: Watch) -> Iterable[str]:
    config = watch.subject.layer.config
    for number, read in enumerate(watch.reads):
        if read.slots_TM.shape[-1] != config.heads * config.topk:
            yield f"{read.slots_TM.shape[-1]} rows a token are read instead of {config.heads} x {config.topk}"
            continue
        slots_TM = read.real(read.slots_TM)
        if len(watch.reads) == len(watch.slots_THK) and len(slots_TM) == len(watch.slots_THK[number]):
            found, got = _distinct_slots(watch.slots_THK[number].flatten(1)), _distinct_slots(slots_TM)
            if got < found:
                yield f"{got:.3g} distinct rows a token are read where the search found {found:.3g}"
    if not watch.reads:
        yield "no row of the table is read"


def _weights_of_all_rows(watch: Watch) -> list[Tensor]:
    rows = watch.subject.layer.config.heads * watch.subject.layer.config.topk
    return [read.real(read.weights_TM) for read in watch.reads if read.weights_TM.shape[-1] == rows]


def _distinct_slots(slots_TM: Tensor) -> float:
    """How many a token has, on average."""
    sorted_TM = slots_TM.sort(-1).values
    return 1 + float((sorted_TM[:, 1:] != sorted_TM[:, :-1]).sum(-1).double().mean()) if len(slots_TM) else 0.0


def _zeros(weights_THK: list[Tensor]) -> float:
    """Share of the weights that are zero, or as good as that beside the largest of their head."""
    sizes_THK = [weights.abs().double() for weights in weights_THK]
    zero = sum(int((size <= NO_WEIGHT * size.amax(-1, keepdim=True)).sum()) for size in sizes_THK)
    return zero / max(1, sum(size.numel() for size in sizes_THK))
