"""The report of an experiment: a page, a plot and the figures as JSON, from what is known of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayers.experiments.experiment import Claim, Experiment, Found, Run, Table
from memlayers.experiments.noise import noise_of
from memlayers.experiments.points import Point, Points, point
from memlayers.experiments.records import Record
from memlayers.experiments.scales import Scale
from memlayers.files import write_json, write_text
from memlayers.presentation import COLOURS, markdown_table, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOLDS = {True: "carries over", False: "does not carry over", None: "open"}


def write_report(
    experiment: Experiment, scale: Scale, found: Found, folder: Path, *, speeds: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write `report.json`, `report.md` and the plot; returns what `report.json` says. Missing runs are shown as such.

    Equal runs give equal reports: the only times in one are `speeds`.
    """
    runs = experiment.runs(scale, found)
    noise = noise_of(scale, found)
    records = {run.config: found(run.config) for run in runs}
    points = {
        name: point([records[run.config] for run in runs if run.point == name], noise)
        for name in dict.fromkeys(run.point for run in runs)
    }
    claims = experiment.claims(scale, points)
    tables = [*([_points_table(runs, points)] if runs else []), *experiment.tables(scale, found)]
    if speeds is not None:
        claims += experiment.speed_claims(scale, found, speeds)
        tables.append(_speed_table(speeds))
    content = {
        "experiment": experiment.name,
        "question": experiment.question,
        "scale": scale.name,
        "noise": noise,
        "runs": len(records),
        "finished": sum(record is not None for record in records.values()),
        "points": {name: one.to_dict() for name, one in points.items()},
        "claims": [claim._asdict() for claim in claims],
        "made_on": _made_on(records.values()),
        "speeds": speeds,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", content)
    write_text(folder / "report.md", _markdown(content, claims, tables, experiment.paper))
    if runs:
        figure = _plot(experiment, places(runs, points, found))
        save_figure(figure, folder / f"{experiment.name}.png")
    return content


def _markdown(content: Mapping[str, Any], claims: Sequence[Claim], tables: Sequence[Table], paper: Table | None) -> str:
    parts = [f"# {content['experiment']}", content["question"]]
    if content["finished"] < content["runs"]:
        parts.append(f"**{content['finished']} of {content['runs']} runs are finished.**")
    parts += ["\n".join(f"- {claim.sentence} *{HOLDS[claim.holds]}*" for claim in claims)] if claims else []
    for table in tables:
        parts += [f"{table.title}:", markdown_table(table.head, table.rows)]
    if paper is not None:
        parts += [f"{paper.title}:", markdown_table(paper.head, paper.rows)]
    noise = content["noise"]
    if not content["runs"]:
        return "\n\n".join(parts) + "\n"
    parts.append(
        "± is the standard error of a mean over seeds"
        + (
            f", from the deviation of its runs, but at least from that of the experiment `noise`, "
            f"{100 * noise:.2f} % of a run's perplexity. "
            if noise is not None
            else " (where there is one run the noise is not known: the experiment `noise` measures it). "
        )
        + "A difference counts above two standard errors. Usage and KL are over validation text."
    )
    parts += content["made_on"]
    return "\n\n".join(parts) + "\n"


def _points_table(runs: Sequence[Run], points: Points) -> Table:
    shown = dict.fromkeys(run.point for run in runs if run.series)
    rows = [_row(name, points[name]) for name in shown]
    tokens = max((one.usage_tokens or 0 for one in points.values()), default=0)
    over = f"; usage over {tokens:,} tokens" if tokens else ""
    head = ["model", "parameters", "of which values", "perplexity", "±", "seeds", "usage %", "by count", "top-1", "KL"]
    return Table(f"Validation perplexity{over}", head, rows)


def _row(name: str, one: Point) -> list[str]:
    if one.perplexity is None:
        return [name, *["-"] * 4, "diverged" if one.failed else "not run yet", *["-"] * 4]
    seeds = f"{one.runs}" if one.runs == one.asked else f"{one.runs} of {one.asked}"
    usage = (one.usage, one.count_usage, one.top1_usage)
    return [
        name,
        _millions(one.parameters),
        _millions(one.value_parameters),
        f"{one.perplexity:.2f}",
        "-" if one.error is None else f"{one.error:.2f}",
        seeds,
        *("-" if figure is None else f"{figure:.1f}" for figure in usage),
        "-" if one.kl is None else f"{one.kl:.2f}",
    ]


def _speed_table(speeds: Mapping[str, Any]) -> Table:
    machine = speeds["hardware"]
    place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    where = f"{place}, PyTorch {speeds['versions']['torch']}"
    if "layers" in speeds:
        rows = [
            [name, f"{1e3 * one['memory']:.2f}", f"{1e3 * one['ffn']:.2f}", f"{one['ratio']:.2f}"]
            for name, one in speeds["layers"].items()
        ]
        head = ["layer", "ms", "ms of the FFN", "ratio"]
        return Table(f"A forward pass over {speeds['tokens']:,} tokens, medians, on {where}", head, rows)
    columns = {
        "prefill_words_per_s": "prefill words/s",
        "decode_tokens_per_s": "decode tokens/s",
        "training_tokens_per_s": "training tokens/s",
    }
    known = {key: head for key, head in columns.items() if all(key in one for one in speeds["models"].values())}
    rows = [
        [name, *(cell for key in known for cell in (f"{one[key]:,.0f}", f"{one['ratios'][key]:.2f}"))]
        for name, one in speeds["models"].items()
    ]
    head = ["model", *(cell for text in known.values() for cell in (text, "ratio"))]
    return Table(
        f"Speeds, medians of models that took turns, ratios to the first of each group, on {where}", head, rows
    )


def _millions(number: int | None) -> str:
    return f"{number / 1e6:,.2f} M" if number else "-"


def _made_on(records: Sequence[Record | None] | Any) -> list[str]:
    """Where the runs were made, a line for each kind of machine, and with what."""
    lines = set()
    for record in records:
        if record is not None:
            machine, versions = record["hardware"], record["versions"]
            where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
            lines.add(f"Runs on {where}; PyTorch {versions['torch']}, memlayers {versions['memlayers']}.")
    return sorted(lines)


Places = Mapping[str, Mapping[float | None, Point]]


def places(runs: Sequence[Run], points: Points, found: Found) -> Places:
    """The lines of the plot, each with its points by their places.

    Runs of one point that stand at several places, as those of `noise` do by their seeds, are plotted one by one.
    """
    xs: dict[str, set[float | None]] = {}
    for run in runs:
        xs.setdefault(run.point, set()).add(run.x)
    series: dict[str, dict[float | None, Point]] = {}
    for run in runs:
        one = points[run.point] if len(xs[run.point]) == 1 else point([found(run.config)], None)
        if run.series and one.perplexity is not None:
            series.setdefault(run.series, {})[run.x] = one
    return series


def _plot(experiment: Experiment, series: Places) -> "Figure":
    """Perplexity, and the usage of the memories if there are any, against what the experiment varies."""
    from matplotlib.figure import Figure  # slow to import, and optional

    has_memories = any(one.usage is not None for places in series.values() for one in places.values())
    figure = Figure(figsize=(10 if has_memories else 5.5, 4.2), layout="constrained", dpi=150)
    quality, *others = panels = figure.subplots(1, 1 + has_memories, sharex=True, squeeze=False)[0]
    for number, (name, places) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        if None in places:
            level: dict[str, Any] = {"color": colour, "linestyle": "--", "linewidth": 1}
            quality.axhline(places[None].perplexity, label=name, **level)
            if (usage := places[None].usage) is not None:
                others[0].axhline(usage, **level)
            continue
        xs = sorted(places)  # type: ignore[type-var]  # no None among them
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "label": name}
        losses, errors = [places[x].perplexity for x in xs], [places[x].error or 0.0 for x in xs]
        quality.errorbar(xs, losses, yerr=errors, capsize=3, **style)
        if all(places[x].usage is not None for x in xs):
            others[0].plot(xs, [places[x].usage for x in xs], **style)
    quality.set_ylabel("validation perplexity")
    for used in others:
        used.set_ylabel("slots used (%)")
        used.set_ylim(0, 104)
    for axes in panels:
        axes.set_xlabel(experiment.x_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if experiment.log_x:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for places in series.values() for x in places if x is not None})
            axes.set_xticks(ticks, [f"{x:,.0f}" if x >= 1 else f"{x:g}" for x in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)  # layers, seeds, blocks
    if series:
        quality.legend(frameon=False, fontsize=8)
    return figure
