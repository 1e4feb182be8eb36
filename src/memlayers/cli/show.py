"""What the commands print."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memlayers.lm.config import RunConfig

if TYPE_CHECKING:
    from memlayers.lm.data import Corpus

Lines = list[tuple[str, str]]


def table(lines: Sequence[tuple[str, str]]) -> str:
    """Names and what is said of them, in two columns."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def training(result: Mapping[str, Any]) -> str:
    """A finished run."""
    run = result["training"]
    return (
        f"{result['parameters']['total']:,} parameters, {run['tokens']:,} tokens in {run['seconds']:,.0f} s "
        f"({run['tokens_per_s']:,.0f} tokens/s)\n{quality(result['validation'])}"
    )


def quality(evaluation: Mapping[str, Any]) -> str:
    """An evaluation, and the usage of each memory."""
    from memlayers.experiments.report import figure

    lines = [
        f"perplexity {evaluation['perplexity']:.2f} per token, {figure(evaluation['perplexity_per_word'])} per word, "
        f"{evaluation['bits_per_byte']:.4f} bits per byte (over {evaluation['tokens']:,} tokens)"
    ]
    for name, report in evaluation["usage"].items():
        overall = report["overall"]
        lines.append(
            f"{name}: usage {overall['usage']:.1f} %, KL {overall['kl']:.3f}, "
            f"top-1 usage {overall['top1_usage']:.1f} % of {report['slots']:,} slots (over {report['tokens']:,} tokens)"
        )
    return "\n".join(lines)


def corpus(corpus: "Corpus", seconds: float | None) -> str:
    """A prepared corpus, and how fast it was made; no `seconds`: it was there already."""
    lines: Lines = [("corpus", f"{corpus.folder}{'' if seconds is not None else ', which was ready'}")]
    num_bytes = 0
    for name in ("train", "validation", "test"):
        split = getattr(corpus, name)
        num_bytes += split.num_bytes
        shards = f", {len(split.shards)} shard{'' if len(split.shards) == 1 else 's'}" if name == "train" else ""
        text = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_words:,} words{shards}"
        lines.append((name, text))
    lines.append(("vocabulary", f"{corpus.vocab_size:,} tokens"))
    left_out = [("blank", "blank_documents"), ("malformed", "malformed_records")]
    lines.append(("left out", ", ".join(f"{corpus.manifest[field]:,} {what}" for what, field in left_out)))
    if seconds is not None:
        lines.append(("time", f"{seconds:,.1f} s ({num_bytes / 1e6 / seconds:,.1f} MB/s of text)"))
    return table(lines)


def machine() -> Lines:
    """Versions, devices, and what runs each operation."""
    from memlayers.info import hardware, operations, versions

    found = hardware()
    return [
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("cpu", f"{found['cpu']}, {found['cpu_cores']} cores, {found['threads']} threads"),
        ("gpu", f"{found['gpu']}, {found['gpu_gigabytes']} GiB" if found["gpu"] else "none"),
        *operations().items(),
    ]


def configuration(config: RunConfig, vocab_size: int) -> Lines:
    """The model of a configuration: its sizes, its parameters, and the memory that its training needs."""
    from memlayers.info import count_parameters
    from memlayers.lm.build import build_model

    model, lines = config.model, []
    counts = count_parameters(build_model(config, vocab_size=vocab_size, eot_id=0, device="meta"))
    sizes = f"{model.family}, {model.layers} layers, dim {model.dim}, {model.heads} heads, context {model.context}"
    lines.append(("model", f"{sizes}, vocabulary {vocab_size:,}"))
    if config.memory_layers:
        memory = config.memory
        lines.append(
            (
                "memory",
                f"layers {', '.join(map(str, config.memory_layers))}: {memory.slots:,} slots, {memory.heads} heads "
                f"x {memory.topk} neighbours, query width {memory.query_dim}",
            )
        )
    lines += [(f"{part} parameters", f"{number:,}") for part, number in counts.items()]
    return lines + _needed(config, vocab_size)


def _needed(config: RunConfig, vocab_size: int) -> Lines:
    """Bytes of a training step, with row gradients and as a dense optimizer would need them, and what there is."""
    from memlayers.lm.build import pick_device, resolve_precision
    from memlayers.lm.footprint import available_memory, footprint

    device = pick_device()
    precision = resolve_precision(config.training.precision, device)
    needed = [
        footprint(config, vocab_size=vocab_size, precision=precision, device=device.type, dense=dense).lines()
        for dense in ([False, True] if config.memory_layers else [False])
    ]
    rows = [(names[0], "".join(f"{text:<15}" for text in texts).rstrip()) for names, texts in _columns(needed)]
    kinds = f"{'row optimizer':<15}dense AdamW" if config.memory_layers else "AdamW"
    available = f"{available_memory(device) / 1e9:,.2f} GB on {device}"
    return [("a training step needs", kinds), *[(f"  {name}", text) for name, text in rows], ("available", available)]


def _columns(tables: Sequence[Lines]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Tables of the same names -> each line's names and texts."""
    return [(tuple(name for name, _ in line), tuple(text for _, text in line)) for line in zip(*tables, strict=True)]
