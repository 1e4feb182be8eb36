"""A comparison as a table in Markdown, one sentence, and a plot. Everything here is computed from `results.json`."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memlayers.presentation import COLOURS, markdown_table, perplexity_text, save_figure

Models = Mapping[str, Mapping[str, Any]]


def markdown(content: Mapping[str, Any]) -> str:
    """The whole report: headline, tables with a row per model, and what the figures mean."""
    models: Models = content["models"]
    baseline = models[content["baseline"]]["label"]
    parts = [
        content["headline"],
        _table(models, _quality_columns(models)),
        _table(models, _speed_columns(baseline)),
        _memory_table(models),
        _notes(content),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(content: Mapping[str, Any]) -> str:
    """One sentence about the model with the memory against both baselines, whichever way it went."""
    models: Models = content["models"]
    memory = next(model for model in models.values() if model["memory_layers"])
    others = [model for model in models.values() if not model["memory_layers"]]
    deep = models[content["baseline"]]
    own = memory["validation"]["perplexity"]
    against = " and ".join(
        f"{_versus(own, other['validation']['perplexity'])} {other['label']} ({other['validation']['perplexity']:.1f})"
        for other in others
    )
    sentence = f"At equal tokens {memory['label']} has a validation perplexity of {own:.1f}, {against}"
    timed = memory["equal_time"]["perplexity"], deep["equal_time"]["perplexity"]
    if None not in timed:
        sentence += f"; at equal training time {timed[0]:.1f} against {timed[1]:.1f} of {deep['label']}"
    return sentence + (
        f"; it prefills {memory['prefill_ratio']:.2f} and decodes {memory['decode_ratio']:.2f} times as fast "
        f"as {deep['label']}."
    )


def plot(content: Mapping[str, Any], file: Path) -> None:
    """Two panels: validation loss against training tokens, and against training time."""
    from matplotlib.figure import Figure  # slow to import, and optional

    models: Models = content["models"]
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    minutes = max(point["seconds"] for model in models.values() for point in model["curve"]) >= 180
    unit, seconds = ("minutes", 60) if minutes else ("seconds", 1)
    most = max(point["tokens"] for model in models.values() for point in model["curve"])
    scale, prefix = (1e9, "billions") if most >= 2e9 else (1e6, "millions") if most >= 2e5 else (1e3, "thousands")
    for colour, model in zip(COLOURS, models.values(), strict=False):
        losses = [point["loss"] for point in model["curve"]]
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3.5, "label": model["label"]}
        by_tokens.plot([point["tokens"] / scale for point in model["curve"]], losses, **style)
        by_time.plot([point["seconds"] / seconds for point in model["curve"]], losses, **style)
    deadline = min(model["training"]["seconds"] for model in models.values()) / seconds
    by_time.axvline(deadline, color="0.6", linestyle="--", linewidth=1, zorder=0)
    by_time.annotate(
        "first one done",
        (deadline, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        color="0.4",
    )
    by_tokens.set_xlabel(f"training tokens ({prefix})")
    by_time.set_xlabel(f"training time ({unit}, evaluation left out)")
    by_tokens.set_ylabel("validation loss (nats per token)")
    by_tokens.set_title("at equal tokens", fontsize=10, loc="left")
    by_time.set_title("at equal time", fontsize=10, loc="left")
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    by_tokens.legend(frameon=False)
    save_figure(figure, file)


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def _quality_columns(models: Models) -> list[Column]:
    columns: list[Column] = [
        ("parameters", lambda model: _count(model["parameters"]["total"])),
        ("of which values", lambda model: _count(model["parameters"]["values"])),
        ("validation perplexity", lambda model: perplexity_text(model["validation"]["perplexity"])),
        ("at equal time ¹", lambda model: perplexity_text(model["equal_time"]["perplexity"])),
        ("per word", lambda model: perplexity_text(model["validation"]["perplexity_per_word"])),
        ("bits per byte", lambda model: f"{model['validation']['bits_per_byte']:.3f}"),
    ]
    if any(model["test"] for model in models.values()):
        columns.append(("test perplexity", lambda model: perplexity_text(model["test"]["perplexity"])))
        columns.append(("test per word", lambda model: perplexity_text(model["test"]["perplexity_per_word"])))
    return columns


def _speed_columns(baseline: str) -> list[Column]:
    return [
        ("training tokens/s", lambda model: f"{model['training']['tokens_per_s']:,.0f}"),
        ("training words/s", lambda model: f"{model['training']['words_per_s']:,.0f}"),
        ("training time (s)", lambda model: f"{model['training']['seconds']:,.0f}"),
        ("prefill words/s ²", lambda model: f"{model['speed']['prefill_words_per_s']:,.0f}"),
        (f"x {baseline}", lambda model: f"{model['prefill_ratio']:.2f}"),
        ("decode tokens/s ³", lambda model: f"{model['speed']['decode_tokens_per_s']:,.0f}"),
        (f"x {baseline}", lambda model: f"{model['decode_ratio']:.2f}"),
    ]


_USAGE = (
    "Usage: slots that were read at all; KL: of the reads from equally many of each slot, in nats (0: all slots "
    "equally often); top-1 usage: slots that were the first choice of a head."
)


def _memory_table(models: Models) -> str:
    rows = []
    for model in models.values():
        for name, report in model["validation"]["usage"].items():
            overall = report["overall"]
            rows.append(
                [
                    f"{model['label']} (`{name}`)",
                    f"{report['slots']:,}",
                    f"{overall['usage']:.1f}",
                    f"{overall['kl']:.2f}",
                    f"{overall['top1_usage']:.1f}",
                    f"{report['tokens']:,}",
                ]
            )
    head = ["memory", "slots", "usage %", "KL", "top-1 usage %", "over validation tokens"]
    return f"{markdown_table(head, rows)}\n\n{_USAGE}" if rows else ""


def _notes(content: Mapping[str, Any]) -> str:
    models: Models = content["models"]
    model = next(iter(models.values()))
    speed, validation = model["speed"], model["validation"]
    lines = [
        f"Each model was trained on the same {model['training']['tokens']:,} tokens in the same order and evaluated on "
        f"the same {validation['tokens']:,} validation tokens ({validation['words']:,} words). A word is a "
        "whitespace-separated one; perplexity per word is exp(total negative log likelihood / words).",
        f"¹ After {model['equal_time']['seconds']:,.0f} s of training, when the first of them was done; between "
        "evaluations on a line in loss. The learning rate of the others was not annealed then.",
        f"² Windows of {speed['context']} tokens, {speed['batch_windows']} at a time. "
        f"³ One text, KV cache, {speed['new_tokens']} tokens after a prompt of {speed['prompt_tokens']}. "
        f"Medians of {speed['repeats']} interleaved runs in {speed['precision']} on {_device(content, speed)}.",
        "Peak learning rates: "
        + ", ".join(f"{other['label']} {other['learning_rate']:g}" for other in models.values())
        + ".",
    ]
    tested = next((other["test"] for other in models.values() if other["test"]), None)
    if tested:
        lines.append(f"Test figures are over {tested['tokens']:,} tokens ({tested['words']:,} words).")
    return "\n\n".join(lines)


def _device(content: Mapping[str, Any], speed: Mapping[str, Any]) -> str:
    if speed["device"] == "cpu":
        return f"{content['hardware']['cpu']}, {speed['threads']} threads"
    return str(speed["device"])


def _table(models: Models, columns: list[Column]) -> str:
    rows = [[model["label"], *(cell(model) for _, cell in columns)] for model in models.values()]
    return markdown_table(["model", *(head for head, _ in columns)], rows)


def _versus(own: float, other: float) -> str:
    if math.isnan(own) or math.isnan(other):
        return "not comparable to"
    change = f"{abs(own / other - 1):.1%}"
    if f"{own:.1f}" == f"{other:.1f}":
        return "the same as"
    return f"{change} below" if own < other else f"{change} above"


def _count(number: int) -> str:
    if number == 0:
        return "-"
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"
