"""eval, generate, explore, doctor: the commands that use a trained model; and what info says of one."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlayers.cli.configuration import Base, Call
from memlayers.diagnosis import DoctorError, doctor
from memlayers.explorer import explore
from memlayers.lm.build import KINDS, build_model, build_optimizer, pick_device, resolve_precision
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus, open_corpus
from memlayers.lm.data.sources import open_sources
from memlayers.lm.evaluate import evaluate
from memlayers.lm.footprint import available_memory, footprint
from memlayers.lm.generate import generate
from memlayers.lm.mesh import mesh_lines, share_on
from memlayers.lm.opened import open_saved
from memlayers.lm.presets import preset, preset_names
from memlayers.lm.run import RunFolder
from memlayers.lm.saved import read_again
from memlayers.lm.tables import lines as lines_of_tables
from memlayers.models import freeze_base
from memlayers.models.folder import MEMORY_CONFIG_NAME, holds_memory_alone
from memlayers.optim import MemoryAdamW
from memlayers.parameters import count_parameters
from memlayers.presentation import Lines, perplexity_text

BATCH_WINDOWS = 4
MOST_TOKENS = 512  # of a window
EVAL_TOKENS = 1024  # of one that a model of transformers is evaluated on; those of today take a hundred times as many


def run_eval(call: Call) -> None:
    """memlayers eval"""
    options = call.options
    saved = open_saved(options["run"], base=options["base"], values=options["memory_values"], field="run")
    folder = options["corpus"] or saved.corpus
    if folder is None:
        why = "for a model that is no run" if saved.run is None else f"as {saved.run.result} does not say where it is"
        raise ValueError(f"corpus must be given {why}: --corpus FOLDER, from memlayers prepare")
    if not options["corpus"] and not Path(folder).is_dir():
        raise ValueError(f"corpus must be given, since that of the run, {folder!r}, is not there: --corpus FOLDER")
    device = torch.device("cpu") if saved.values == "mapped" else pick_device()  # which files are read by
    corpus = _open_corpus(folder, saved.tokenizer_sha256)
    text, model = getattr(corpus, options["split"]), saved.load()
    how: dict[str, Any]
    if saved.config is not None:
        precision = resolve_precision(saved.config.training.precision, device)
        how = {"context": saved.config.model.context, "precision": precision}
    else:
        text = read_again(text, corpus.tokenizer(), saved.tokenizer(), options["tokens"])
        how = {"context": _limits(model, EVAL_TOKENS)[1], "batch_windows": 4}
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
    evaluation = evaluate(model, text, tokens=options["tokens"], **how).to_dict()
    print(json.dumps(evaluation, indent=2) if options["json"] else quality(evaluation))


def run_generate(call: Call) -> None:
    """memlayers generate"""
    print(generate(**call.options))


def run_explore(call: Call) -> None:
    """memlayers explore"""
    options, device = call.options, pick_device()
    folder, other = Path(options["run"]), options["compare"] and Path(options["compare"])
    saved = open_saved(folder, base=options["base"], field="run")
    compared = None
    if other:  # beside the same base, if it is a memory alone, too
        base = options["base"] if holds_memory_alone(other / MEMORY_CONFIG_NAME) else None
        compared = open_saved(other, base=base, field="compare")
    tokenizer, theirs = saved.tokenizer(), None if compared is None else compared.find_tokenizer()
    if theirs is not None and theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"compare must have the tokenizer of {str(folder)!r}, got {str(other)!r}, which has another one"
        )
    models: list[Any] = [one.load() for one in (saved, compared) if one]
    (group,) = open_sources([options["text"]], text_field="text", id_field="id")
    texts = (document.text for source in group for document in source.documents())
    page = explore(
        models[0].to(device),
        tokenizer,
        texts,
        options["output"],
        name=folder.resolve().name,
        compare=models[1].to(device) if other else None,
        compare_name=other.resolve().name if other else "",
        tokens=options["tokens"],
    )
    print(f"{options['output']}: {len(page.encode()) / 1e6:.1f} MB, to be opened in a browser")


def run_doctor(call: Call) -> None:
    """memlayers doctor"""
    saved = open_saved(call.options["checkpoint"], base=call.options["base"])
    folder = call.options["corpus"] or (saved.corpus if saved.corpus and Path(saved.corpus).is_dir() else None)
    corpus = None if folder is None else _open_corpus(folder, saved.tokenizer_sha256)
    model, device = saved.load(), pick_device()
    ids_BT = _random_ids(model) if corpus is None else _validation_ids(corpus, model)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that loses its signature
    if saved.config is not None and saved.config.base_is_frozen:
        freeze_base(model)
    optimizer = MemoryAdamW(model) if saved.config is None else build_optimizer(saved.config, model)
    report = doctor(model, {"input_ids": ids_BT.to(device)}, optimizer=optimizer)
    if corpus is None:
        report = report.with_failures_as_warnings({"usage"})
    source = "random tokens, so usage cannot fail" if corpus is None else f"validation text of {folder}"
    tokens = f"{ids_BT.numel():,} tokens: {source}"
    print(
        json.dumps({"tokens": tokens, **report.to_dict()}, indent=2) if call.options["json"] else f"{tokens}\n{report}"
    )
    if not report.ok:
        raise DoctorError(f"{len(report.failures)} of {len(report.findings)} checks failed")


def _open_corpus(folder: str, tokenizer_sha256: str | None) -> Corpus:
    corpus = open_corpus(folder)
    if tokenizer_sha256 not in (None, corpus.tokenizer_sha256):
        raise ValueError(f"corpus must have the tokenizer of the run, got {folder!r}, which has another one")
    return corpus


def _validation_ids(corpus: Corpus, model: PreTrainedModel) -> Tensor:
    """Windows [B, T] from the beginning of the validation text."""
    vocab_size, length = _limits(model)
    if corpus.vocab_size > vocab_size:
        raise ValueError(f"corpus must have at most the {vocab_size} tokens of the model, got {corpus.vocab_size}")
    tokens = corpus.validation.shards[0].tokens
    length = min(length, len(tokens))
    windows = min(BATCH_WINDOWS, len(tokens) // max(1, length))
    if length < 2:
        raise ValueError(f"corpus must have at least 2 tokens of validation text, got {length}")
    return torch.from_numpy(np.asarray(tokens[: windows * length], dtype=np.int64)).view(windows, length)


def _random_ids(model: PreTrainedModel) -> Tensor:
    vocab_size, length = _limits(model)
    return torch.randint(vocab_size, (BATCH_WINDOWS, length), generator=torch.Generator().manual_seed(0))


def _limits(model: PreTrainedModel, most: int = MOST_TOKENS) -> tuple[int, int]:
    """Its vocabulary, and the tokens of a window."""
    config = model.config.get_text_config()
    return config.vocab_size, min(most, getattr(config, "max_position_embeddings", None) or most)


def quality(evaluation: Mapping[str, Any]) -> str:
    """An evaluation, and the usage of each memory."""
    per_word = perplexity_text(evaluation["perplexity_per_word"])
    lines = [
        f"perplexity {evaluation['perplexity']:.2f} per token, {per_word} per word, "
        f"{evaluation['bits_per_byte']:.4f} bits per byte (over {evaluation['tokens']:,} tokens)"
    ]
    for name, report in evaluation["usage"].items():
        overall = report["overall"]
        lines.append(
            f"{name}: usage {overall['usage']:.1f} % of {report['slots']:,} slots, top-1 usage "
            f"{overall['top1_usage']:.1f} % (the first choice of a head), KL {overall['kl']:.3f} (0: all are read "
            f"equally often, {math.log(report['slots']):.1f}: one alone), over {report['tokens']:,} tokens"
        )
    return "\n".join(lines)


def asked_for(call: Call) -> Lines:
    """What `memlayers info` says of the run, the preset or the configuration that it was given."""
    what, base = call.options["what"], call.base
    assert base is not None
    vocab_size = None
    if what is not None:
        if base.chosen:
            raise ValueError(f"{what!r} is a configuration already: give no --preset or --config beside it")
        if what in preset_names():
            base = Base.of(RunConfig, preset(what))
        else:
            folder = RunFolder(what)
            base = Base.of(RunConfig, folder.read_config())
            if folder.finished and "data.vocab_size" not in call.fields:
                vocab_size = _entry(_entry(folder.read_result(), "data", folder.result), "vocab_size", folder.result)
    config, mesh = base.configuration(call.fields), call.options["mesh"]
    if mesh:
        share_on(config, mesh)  # mistakes show before the seconds of the rest
    vocab_size = vocab_size or config.data.vocab_size
    lines = _described(config, vocab_size)
    return lines + on_mesh(config, mesh, vocab_size) if mesh else lines


def on_mesh(config: RunConfig, mesh: Sequence[int], vocab_size: int) -> Lines:
    """`mesh_lines` for processes with the device of this machine."""
    device = pick_device()
    precision = resolve_precision(config.training.precision, device)
    return mesh_lines(config, mesh, vocab_size=vocab_size, precision=precision, device=device)


def _described(config: RunConfig, vocab_size: int) -> Lines:
    """The model of a configuration: its sizes, its parameters, and the memory that its training needs."""
    model, lines = config.model, []
    counts = count_parameters(build_model(config, vocab_size=vocab_size, eot_id=0, device="meta"))
    sizes = f"{model.family}, {model.layers} layers, dim {model.dim}, {model.heads} heads, context {model.context}"
    lines.append(("model", f"{sizes}, vocabulary {vocab_size:,}"))
    if config.memory_layers:
        memory = config.memory
        kind = KINDS[config.memory_kind].__name__ + (" beside the FFN" if config.memory_mode == "parallel" else "")
        kind += ", one table" if config.memory_share_values else ""
        lines.append(
            (
                "memory",
                f"layers {', '.join(map(str, config.memory_layers))}: {memory.slots:,} slots, {memory.heads} heads "
                f"x {memory.topk} neighbours, query width {memory.query_dim}; {kind}",
            )
        )
    lines += [(f"{part} parameters", f"{number:,}") for part, number in counts.items()]
    return lines + _needed(config, vocab_size)


def _needed(config: RunConfig, vocab_size: int) -> Lines:
    """Bytes of a training step, with row gradients and as a dense optimizer would need them, and what there is."""
    device = pick_device()
    precision = resolve_precision(config.training.precision, device)
    needed = [
        footprint(config, vocab_size=vocab_size, precision=precision, device=device.type, dense=dense).lines()
        for dense in ([False, True] if config.memory_layers else [False])
    ]
    rows = [
        (f"  {line[0][0]}", "".join(f"{text:<15}" for _, text in line).rstrip()) for line in zip(*needed, strict=True)
    ]
    kinds = f"{'row optimizer':<15}dense AdamW" if config.memory_layers else "AdamW"
    available = f"{available_memory(device) / 1e9:,.2f} GB on {device}"
    need = footprint(config, vocab_size=vocab_size, precision=precision, device=device.type)
    return [("a training step needs", kinds), *rows, *lines_of_tables(config, need), ("available", available)]


def _entry(content: Any, name: str, file: Path) -> Any:
    if not isinstance(content, Mapping) or name not in content:
        raise ValueError(f"{file} is damaged: it has no {name!r}")
    return content[name]
