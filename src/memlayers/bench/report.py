"""The results as text and as plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlayers.bench.result import OURS, Result
from memlayers.bench.shapes import AXES, Axis, axis_value
from memlayers.bench.timing import summary
from memlayers.presentation import COLOURS, markdown_table, save_figure

_LABELS = {"slots": "slots", "topk": "rows read per head", "tokens": "tokens of a batch"}


def lines(result: Result) -> list[str]:
    """A line for each contender, for the progress."""
    where = [result.shape.name] if result.case in AXES else []
    head = "".join(f"{part}: " for part in (*where, result.part) if part)
    found = [f"{head}{name} {_amount(result, name)}{_times(result, name)}" for name in result.samples]
    return found + [f"{head}{note}" for note in result.notes]


def markdown(content: Mapping[str, Any], results: list[Result]) -> str:
    """Where it was measured, then a table for each case and shape; a sweep is one table."""
    machine = content["hardware"]
    where = f"{machine['cpu']}, {machine['threads']} of {machine['cpu_cores']} cores"
    how = ""
    if content["gpu"] is not None:
        gpu = content["gpu"]
        where = (
            f"{content['device']}: {gpu['name']} ({gpu['gigabytes']} GiB, {gpu['multiprocessors']} multiprocessors, "
            f"{gpu['cache_megabytes']} MB of L2), driver {gpu['driver'] or 'unknown'}, {gpu['runtime']}; beside {where}"
        )
        how = " Times are the device's, between events, with a cold cache; launches count where that is said."
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    parts = [
        f"`{content['command']}`",
        f"{where}; {versions}; {content['kernels']}; commit {content['commit'] or 'unknown'}.",
        "Interleaved rounds; medians, quartiles and minima over the rounds; the ratio is the median over the rounds of "
        "a contender's time to ours in the same round, so above 1 ours is faster. A limit is what the machine can do, "
        "measured in the same rounds. Results were held to the references before anything was timed. "
        f"Everything is float32 unless said otherwise, its products, too (no TF32).{how}",
    ]
    for result in results:
        if result.case not in AXES:
            parts += [_title(result), *_table(result)]
    for axis in AXES:
        found = [result for result in results if result.case == axis]
        if found:
            parts += [f"### Cost against {_LABELS[axis]}", *_sweep_table(axis, found)]
    return "\n\n".join(parts) + "\n"


def plot(axis: Axis, results: list[Result], file: Path) -> None:
    """A panel for each part: time against the axis, a line with quartiles for each contender. None without samples."""
    results = [result for result in results if result.samples]
    if not results:
        return
    from matplotlib.figure import Figure  # slow to import, and optional

    parts = list(dict.fromkeys(result.part for result in results))
    figure = Figure(figsize=(5 * len(parts), 4.2), layout="constrained", dpi=150)
    widest = max(result.shape.value_dim for result in results)
    for panel, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        of_part = [result for result in results if result.part == part]
        names = list(dict.fromkeys(name for result in of_part for name in result.samples))
        for colour, name in zip(COLOURS, names, strict=False):
            for width in sorted({result.shape.value_dim for result in of_part}, reverse=True):
                points = [
                    (axis_value(axis, result.shape), summary(result.samples[name]))
                    for result in of_part
                    if name in result.samples and result.shape.value_dim == width
                ]
                if not points:
                    continue
                x, low, middle, high = zip(
                    *(
                        (at, *(1e3 * of[key] for key in ("lower_quartile", "median", "upper_quartile")))
                        for at, of in sorted(points, key=lambda point: point[0])
                    ),
                    strict=True,
                )
                label = name if width == widest else f"{name}, width {width}"
                marker = "o" if width == widest else "x"
                panel.plot(x, middle, color=colour, marker=marker, markersize=4, label=label)
                panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(_LABELS[axis])
        panel.set_ylabel("milliseconds")
        panel.set_title(part, fontsize=10, loc="left")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    save_figure(figure, file)


def _title(result: Result) -> str:
    part = f", {result.part}" if result.part else ""
    return f"### {result.case}{part}: {result.shape.name}\n\n{result.shape.describe()}."


def _table(result: Result) -> list[str]:
    if not result.samples:
        return list(result.notes)
    if result.unit == "bytes":
        head = ["contender", "peak (GB)", "of ours"]
        rows = [[name, f"{samples[0] / 1e9:,.2f}", _ratio(result, name)] for name, samples in result.samples.items()]
    else:
        limit = result.limit.removesuffix(" (limit)")
        head = ["contender", "median (ms)", "quartiles", "minimum", "of ours", "rate", f"of {limit}"]
        rows = []
        for name, samples in result.samples.items():
            figures = {key: _milliseconds(value) for key, value in summary(samples).items()}
            quartiles = f"{figures['lower_quartile']} to {figures['upper_quartile']}"
            rate = result.rate(name)
            speed = f"{rate[0]:,.1f} {rate[1]}" if rate else ""
            times = [figures["median"], quartiles, figures["minimum"]]
            rows.append([name, *times, _ratio(result, name), speed, _share(result, name)])
        kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
        head, rows = [head[i] for i in kept], [[row[i] for i in kept] for row in rows]
    rounds = "" if result.unit == "bytes" else f"{len(next(iter(result.samples.values())))} rounds. "
    notes = rounds + " ".join(f"{note}." for note in result.notes)
    return [markdown_table(head, rows), *([notes.strip()] if notes else [])]


def _sweep_table(axis: Axis, results: list[Result]) -> list[str]:
    columns = list(dict.fromkeys((result.part, name) for result in results for name in result.samples))
    head = [_LABELS[axis]]
    for part, name in columns:
        head += [f"{part}: {name} (ms)"] + ([] if name == OURS else ["of ours"])
    rows = []
    for at in sorted({axis_value(axis, result.shape) for result in results}):
        row = [f"{at:,}"]
        for part, name in columns:
            there = (one for one in results if axis_value(axis, one.shape) == at and one.part == part)
            found = next((one for one in there if name in one.samples), None)
            row.append("-" if found is None else _milliseconds(summary(found.samples[name])["median"]))
            if name != OURS:
                row.append("-" if found is None else _ratio(found, name))
        rows.append(row)
    notes = [f"{axis_value(axis, one.shape):,}, {one.part}: {note}." for one in results for note in one.notes]
    return [f"{results[0].shape.describe(axis)}.", markdown_table(head, rows), *([" ".join(notes)] if notes else [])]


def _amount(result: Result, name: str) -> str:
    middle = summary(result.samples[name])["median"]
    return f"{middle / 1e9:.2f} GB" if result.unit == "bytes" else f"{_milliseconds(middle)} ms"


def _times(result: Result, name: str) -> str:
    if name != OURS and result.ratio(name) is not None:
        return f" = {_ratio(result, name)} x ours"
    rate = result.rate(name)
    if rate is None:
        return ""
    share = _share(result, name)
    return f" = {rate[0]:,.1f} {rate[1]}" + (f", {share} of {result.limit}" if share else "")


def _share(result: Result, name: str) -> str:
    share = result.share(name)
    return "" if share is None else f"{100 * share:.0f} %"


def _ratio(result: Result, name: str) -> str:
    ratio = result.ratio(name)
    return "" if ratio is None else f"{ratio:.2f}"


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
