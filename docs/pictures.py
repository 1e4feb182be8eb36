"""The pictures of docs/explanation.md: `python docs/pictures.py` draws them again and says what it wrote."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent

# Distinct for colour-blind readers and in print (Okabe and Ito's palette).
BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
GREY, PALE = "0.45", "0.93"


def draw_flow(figure: Figure) -> None:
    """One head of one token, with the paper's sizes."""
    axes = _canvas(figure, 12, 4.8)
    _box(axes, 0.75, 2.6, 0.8, 0.9, "$x$\n$D$", PALE)
    _box(axes, 2.35, 2.6, 1.4, 1.3, "query\nnetwork\nlinear + norm", PALE)
    for y, half, colour in ((3.85, "first", BLUE), (1.35, "second", GREEN)):
        _box(axes, 4.3, y, 1.3, 0.9, f"{half} half\nQ/2 = 256", _tint(colour))
        _box(axes, 6.15, y, 1.5, 1.2, f"{half} codebook\nN = 512 sub-keys\nK = 32 best", _tint(colour))
        _arrow(axes, (3.05, 2.6 + 0.3 * np.sign(y - 2.6)), (3.65, y - 0.15 * np.sign(y - 2.6)))
        _arrow(axes, (4.95, y), (5.4, y))
        _arrow(axes, (6.9, y - 0.15 * np.sign(y - 2.6)), (7.35, 2.6 + 0.45 * np.sign(y - 2.6)))
    _arrow(axes, (1.15, 2.6), (1.65, 2.6))
    _box(axes, 8.05, 2.6, 1.4, 1.5, "K $\\times$ K = 1,024\ncandidates:\nsums of two\nhalf scores", _tint(ORANGE))
    _box(axes, 9.65, 2.6, 1.1, 1.3, "K = 32\nslots of\n262,144", _tint(ORANGE))
    _arrow(axes, (8.75, 2.6), (9.1, 2.6))
    _arrow(axes, (9.65, 3.25), (9.65, 3.85), "softmax of\ntheir scores", (0.08, 0.0))
    _box(axes, 9.65, 4.25, 1.1, 0.8, "weights $w$", _tint(RED))
    _arrow(axes, (9.65, 1.95), (9.65, 1.5), "read", (0.08, 0.0))
    _table(axes, 9.1, 0.15, 1.1, 1.35, rows=9, marked=(1, 4, 5, 7), colour=RED)
    axes.text(9.02, 0.82, "values\n262,144 rows", ha="right", va="center", fontsize=9, color=GREY)
    _arrow(axes, (10.2, 4.25), (11.1, 3.0))
    _arrow(axes, (10.2, 0.9), (11.1, 2.2))
    _box(axes, 11.35, 2.6, 0.9, 0.8, r"$\sum w_i v_i$", _tint(RED))
    axes.text(
        0.3, 0.35, "one head of one token; H = 4 heads do the same,\neach with its own query and keys", **_note("left")
    )


def draw_staircase(figure: Figure) -> None:
    """All pair sums of a small memory, and the K x K grid of its best halves in order."""
    topk, size = 8, 24
    rng = np.random.default_rng(8)
    first, second = rng.normal(size=size), rng.normal(size=size)
    best_first, best_second = np.argsort(-first)[:topk].tolist(), np.argsort(-second)[:topk].tolist()
    sums = first[:, None] + second
    hits = [divmod(slot, size) for slot in np.argsort(-sums, axis=None)[:topk].tolist()]
    hit_ranks = [(best_first.index(row), best_second.index(column)) for row, column in hits]
    shades = {"cmap": "Blues", "vmin": sums.min(), "vmax": sums.max() * 2}
    all_pairs, candidates = figure.subplots(1, 2)

    all_pairs.imshow(sums, **shades)
    for row in range(size):
        for column in range(size):
            if row in best_first and column in best_second:
                _cell(all_pairs, row, column, fill=False, edgecolor=ORANGE, linewidth=1.5)
            else:
                _cell(all_pairs, row, column, facecolor="white", alpha=0.5, linewidth=0)
    rows, columns = zip(*hits, strict=True)
    all_pairs.plot(columns, rows, "o", color=RED, markersize=7)
    all_pairs.set_title(f"all N² = {size**2} slots of N = {size} sub-keys a half", fontsize=11)
    all_pairs.set_xlabel("second sub-key", fontsize=10)
    all_pairs.set_ylabel("first sub-key", fontsize=10)
    all_pairs.set_xticks([])
    all_pairs.set_yticks([])

    grid = sums[np.ix_(best_first, best_second)]
    candidates.imshow(grid, **shades)
    inside = 0
    for i in range(topk):
        for j in range(topk):
            is_inside, is_hit = (i + 1) * (j + 1) <= topk, (i, j) in hit_ranks
            inside += is_inside
            assert is_inside or not is_hit
            if not is_inside:
                _cell(candidates, i, j, facecolor="0.93", edgecolor="white")
            if is_hit:
                candidates.plot(j, i, "o", color=RED, markersize=24)
            colour = "white" if is_hit else "black" if is_inside else "0.6"
            weight = "bold" if is_hit else "normal"
            candidates.text(
                j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8, weight=weight, color=colour
            )
    edge = [(-0.5, topk - 0.5)]
    for i in reversed(range(topk)):
        reach = topk // (i + 1) - 0.5
        edge += [(reach, i + 0.5), (reach, i - 0.5)]
    candidates.plot(*zip(*edge, strict=True), color=ORANGE, linewidth=2.5)
    candidates.set_title(
        f"the K $\\times$ K candidates, K = {topk}: i · j ≤ K leaves {inside} of {topk**2}", fontsize=11
    )
    candidates.set_xlabel("rank j of the second half score", fontsize=10)
    candidates.set_ylabel("rank i of the first half score", fontsize=10)
    candidates.set_xticks(range(topk), range(1, topk + 1))
    candidates.set_yticks(range(topk), range(1, topk + 1))


def draw_modes(figure: Figure) -> None:
    """A block as it was, with a memory in place of its FFN, and with one beside it."""
    for axes, mode in zip(figure.subplots(1, 3), ("as it was", "replace", "parallel"), strict=True):
        axes.set(xlim=(0.2, 4.4), ylim=(-0.3, 5), aspect="equal")
        axes.axis("off")
        axes.set_title(f'mode="{mode}"' if mode != "as it was" else "a block as it was", fontsize=11)
        _arrow(axes, (0.6, 0.1), (0.6, 4.95))
        _branch(axes, 0.45, 1.75)
        _branch(axes, 2.25, 4.4)
        _box(axes, 2.1, 1.1, 1.9, 0.6, "norm, attention", PALE)
        _box(axes, 2.1, 2.65, 1.9, 0.45, "norm", PALE)
        if mode == "as it was":
            _box(axes, 2.1, 3.55, 1.9, 0.6, "FFN", _tint(BLUE))
            axes.text(0.85, 4.62, "x + FFN(x)", fontsize=10)
        elif mode == "replace":
            _box(axes, 2.1, 3.55, 1.9, 0.6, "memory", _tint(RED))
            axes.text(0.85, 4.62, "x + m(x)", fontsize=10)
        else:
            _line(axes, (2.1, 2.85), (2.1, 3.03), (3.2, 3.03), (3.2, 4.4), (2.1, 4.4))
            _box(axes, 2.1, 3.6, 1.0, 0.6, "FFN", _tint(BLUE))
            _box(axes, 3.2, 3.42, 1.0, 0.5, "memory", _tint(RED))
            _box(axes, 3.2, 4.0, 1.0, 0.36, "· gate", _tint(ORANGE))
            axes.text(0.85, 4.62, "x + FFN(x) + gate · m(x)", fontsize=10)
            axes.text(3.78, 4.0, "zero at\nthe start", fontsize=8, color=GREY, va="center")
        axes.text(0.6, -0.12, "x", ha="center", va="top", fontsize=11)


def draw_training(figure: Figure) -> None:
    """What a step holds and writes with a dense gradient, and with a row gradient."""
    read = (2, 3, 7, 10)
    for axes, rows in zip(figure.subplots(1, 2), (False, True), strict=True):
        axes.set(xlim=(0, 8), ylim=(-0.4, 5.5), aspect="equal")
        axes.axis("off")
        title = "row gradient, row optimizer" if rows else "dense gradient, dense optimizer"
        axes.text(0.2, 5.15, title, fontsize=11, weight="bold")
        marked = read if rows else range(12)
        for x, name in ((0.2, "table"), (4.2, "moment 1"), (6.2, "moment 2")):
            _table(axes, x, 0.6, 1.6, 3.8, rows=12, marked=marked, colour=RED, dark=read)
            axes.text(x + 0.8, 4.5, name, ha="center", va="bottom", fontsize=10)
        axes.text(3.0, 4.5, "gradient", ha="center", va="bottom", fontsize=10)
        if rows:
            factors = ("slots\n[T, H·K]", "weights\n[T, H·K]", "gradient of\noutput [T, V]")
            for y, factor in zip((3.75, 2.5, 1.25), factors, strict=True):
                _box(axes, 3.0, y, 1.5, 0.9, factor, _tint(GREEN), fontsize=8)
            note = (
                "held: three small factors; written: the rows that were read\n"
                "and their moments. The rest stays as it was, bit for bit"
            )
        else:
            _table(axes, 2.2, 0.6, 1.6, 3.8, rows=12, marked=range(12), colour=GREEN, dark=read)
            note = (
                "held: a gradient as large as the table, zero in rows not read;\n"
                "written: every row and every moment, each step"
            )
        axes.text(0.2, 0.3, note, va="top", fontsize=9, color="0.25")


PICTURES = {
    "flow.png": (draw_flow, (10.8, 4.35)),
    "staircase.png": (draw_staircase, (10, 5)),
    "modes.png": (draw_modes, (9.6, 4.5)),
    "rows.png": (draw_training, (10.4, 3.9)),
}


def _canvas(figure: Figure, width: float, height: float) -> Axes:
    axes = figure.add_subplot()
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour, fontsize: float = 9) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0,rounding_size=0.1", facecolor=colour, edgecolor="0.3"
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=fontsize, linespacing=1.3)


def _arrow(axes: Axes, start, end, text: str = "", shift=(0.0, 0.0)) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "->", "color": "0.3", "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    )
    if text:
        middle = ((start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1])
        axes.text(*middle, text, fontsize=8, color=GREY, va="center", ha="left")


def _branch(axes: Axes, low: float, high: float) -> None:
    """Out of the residual stream and back into it."""
    _line(axes, (0.6, low), (2.1, low), (2.1, high))
    _arrow(axes, (2.1, high), (0.72, high))
    axes.plot(0.6, high, "o", markersize=13, markerfacecolor="white", markeredgecolor="0.3", zorder=3)
    axes.text(0.6, high, "+", ha="center", va="center", fontsize=11, zorder=4)


def _line(axes: Axes, *points: tuple[float, float]) -> None:
    axes.plot(*zip(*points, strict=True), color="0.3", linewidth=1.3, zorder=0)


def _cell(axes: Axes, row: int, column: int, **style) -> None:
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **style))


def _table(axes: Axes, x: float, y: float, width: float, height: float, *, rows, marked, colour, dark=()) -> None:
    step = height / rows
    for row in range(rows):
        face = "white"
        if row in marked:
            face = colour if row in (dark or marked) else _tint(colour)
        top = y + height - (row + 1) * step
        axes.add_patch(Rectangle((x, top), width, step, facecolor=face, edgecolor="0.6", linewidth=0.7))


def _tint(colour: str) -> tuple[float, ...]:
    return tuple(1 - 0.25 * (1 - int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))


def _note(align: str) -> dict:
    return {"fontsize": 9, "color": GREY, "ha": align, "va": "center"}


def main(folder: Path = FOLDER) -> None:
    for name, (draw, size) in PICTURES.items():
        figure = Figure(figsize=size, layout="constrained", dpi=130)
        draw(figure)
        file = folder / name
        figure.savefig(file, format="png", metadata={"Software": None})
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
