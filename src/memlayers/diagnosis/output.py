"""Is the output of a sensible size, beside that of a feed-forward network or of the input?"""

from torch import Tensor

from memlayers.diagnosis.findings import NOT_REACHED, Answer, fails, passed, warns
from memlayers.diagnosis.watch import Watch

# A memory's output beside its input, or a network's. Random memories of widths 16 to 256 have 0.01 to 0.5 of their
# input, trained ones had 0.07 to 3.4.
LEAST_RATIO, MOST_RATIO = 1e-3, 1e2


def output(watch: Watch) -> Answer:
    if not watch.tokens:
        return NOT_REACHED
    rms = watch.output.rms
    if rms == 0 or rms - rms != 0:
        what = "zero" if rms == 0 else "not finite"
        return fails(f"its output is {what}", f"look at the table and at what comes in: something there is {what}, too")
    others = sorted(squares.rms for squares in watch.beside if squares.count)
    network = "the network beside it" if watch.subject.is_parallel else "other blocks' networks"
    beside = {"its input": _rms(watch.inputs_TD)} | ({network: others[len(others) // 2]} if others else {})
    ratios = {what: rms / other for what, other in beside.items() if other > 0}
    said = f"root mean square {rms:.3g}" + "".join(
        f", {ratio:.3g} times that of {what}" for what, ratio in ratios.items()
    )
    if far_off(list(ratios.values())):
        return warns(
            said, f"expected is {LEAST_RATIO:g} to {MOST_RATIO:g}: look at the scale of table and output projection"
        )
    return passed(said)


def far_off(ratios: list[float]) -> bool:
    """Beside everything that it is compared with: a network with small random weights says little alone."""
    return bool(ratios) and not any(LEAST_RATIO <= ratio <= MOST_RATIO for ratio in ratios)


def _rms(parts: list[Tensor]) -> float:
    total = sum(float(part.double().square().sum()) for part in parts)
    return (total / sum(part.numel() for part in parts)) ** 0.5
