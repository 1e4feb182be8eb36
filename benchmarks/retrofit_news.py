"""A memory beside a pretrained model against an adapter, LoRA and full finetuning: new text learned, old text kept.

    python benchmarks/retrofit_news.py --news news.jsonl.xz --output runs/retrofit [--only memory]

A small GPT-2 is trained on the news articles dated up to 2018. Then it learns articles of 2020 in four ways, each with
its own learning rates at equal tokens: a parallel memory and nothing else; a dense adapter of as many multiplications,
in the same place; LoRA on as many blocks and of such a rank that a step takes as long; all weights. The rate is chosen
on held-out articles of 2020 (validation); both test sets, 2020 and up to 2018, are looked at with the chosen rates
alone. Undated articles are left out. Every run is written to the output folder when it is done, and not repeated.
"""

import copy
import gc
import hashlib
import json
import lzma
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from memlayers import MemoryConfig, add_memory
from memlayers.files import write_json
from memlayers.lm.build import batch_loss
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.data import DataConfig, Split, Windows, training_order
from memlayers.lm.data.corpus import DOCUMENT, END_OF_TEXT, open_corpus
from memlayers.lm.data.tokenize import encode_texts, load_tokenizer, token_dtype
from memlayers.lm.evaluate import evaluate
from memlayers.lm.run import RunFolder
from memlayers.lm.train import train
from memlayers.models import freeze_base
from memlayers.optim import MemoryAdamW

BLOCK, BATCH, SEED = 3, 8, 0  # the block of the memory and of the adapter; windows of a step
MEMORY = {"heads": 4, "topk": 16, "num_subkeys": 128, "query_dim": 64, "query_norm": "rms"}
LORA_BLOCKS, LORA_RANK = (3, 4), 32
# (rate of the dense parameters, rate of the values)
RATES: dict[str, tuple[tuple[float, float], ...]] = {
    "memory": ((1e-3, 1e-2), (3e-3, 1e-2), (3e-3, 3e-2), (1e-2, 3e-2), (1e-2, 1e-1), (3e-2, 1e-1), (1e-2, 3e-1)),
    "adapter": ((3e-4, 0), (1e-3, 0), (3e-3, 0), (1e-2, 0), (3e-2, 0)),
    "lora": ((1e-3, 0), (3e-3, 0), (1e-2, 0), (3e-2, 0)),
    "full": ((1e-4, 0), (3e-4, 0), (1e-3, 0), (3e-3, 0)),
}


def main(news: str, output: str = "runs/retrofit", tokens: int = 400_000, only: str | None = None) -> None:
    """Prints a line a run and the table at the end."""
    folder = Path(output)
    base = train_base(news, folder)
    texts = texts_of_2020(news, folder)
    for method, rates in RATES.items():
        if only in (None, method):
            for rate in rates:
                print(json.dumps(adapt(base, texts, folder, method, rate, tokens)), flush=True)
    if only is None:
        print(table(base, texts, folder, tokens))


def train_base(news: str, folder: Path) -> RunFolder:
    """The run of the base, on text that ends with 2018."""
    old = folder / "until-2018.jsonl"
    if not old.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = old.with_suffix(".partial")
        with aside.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(article) + "\n" for article in articles(news) if year(article) <= "2018")
        aside.rename(old)
    config = RunConfig(
        data=DataConfig(sources=(str(old),), vocab_size=8192),
        model=ModelConfig(layers=4, dim=192, heads=6, context=256),
        memory=MemoryConfig(dim=192),
        training=TrainingConfig(
            tokens=7_000_000, batch_tokens=2048, learning_rate=2.5e-3, eval_every_tokens=1_000_000, eval_tokens=100_000
        ),
    )
    run = RunFolder(folder / "base")
    if not run.finished:
        train(config, run.path, corpus=folder / "corpus", resume=True)
    return run


def articles(news: str) -> Iterator[dict[str, Any]]:
    """Those with a date."""
    with lzma.open(news, "rt", encoding="utf-8") as lines:
        for line in lines:
            article = json.loads(line)
            if year(article).isdigit():
                yield article


def year(article: dict[str, Any]) -> str:
    return (article["date"] or "")[:4]


def texts_of_2020(news: str, folder: Path) -> dict[str, Split]:
    """Articles of 2020 in tokens of the base, split by the hash of their ids as a corpus is."""
    tokenizer = load_tokenizer(folder / "corpus" / "tokenizer")
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    parts: dict[str, list[str]] = {"validation": [], "test": [], "train": []}
    for article in articles(news):
        if year(article) == "2020":
            number = int(hashlib.md5(article["id"].encode()).hexdigest(), 16) % 100
            parts[("validation", "test")[number] if number < 2 else "train"].append(article["text"])
    splits = {}
    for name, texts in parts.items():
        ids = [np.array([end_of_text, *encoded.ids]) for encoded in encode_texts(tokenizer, texts)]
        documents = np.zeros(len(ids), DOCUMENT)
        documents["offset"] = np.cumsum([0, *map(len, ids)])[:-1]
        documents["words"] = [len(text.split()) for text in texts]
        documents["bytes"] = [len(text.encode()) for text in texts]
        splits[name] = Split(np.concatenate(ids).astype(token_dtype(tokenizer.get_vocab_size())), documents)
    return splits


class Adapter(nn.Module):
    """f(x) + W2 relu(W1 x), with W2 zero at the start."""

    def __init__(self, base: nn.Module, dim: int, width: int):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x).relu())


def multiplications(config: MemoryConfig) -> int:
    """Of one memory and token: the query, the scores of the sub-keys, the rows read."""
    query = config.dim * config.heads * config.query_dim
    return query + config.heads * config.num_subkeys * config.query_dim + config.heads * config.topk * config.width


def with_memory(model: Any) -> Any:
    add_memory(model, MemoryConfig(dim=model.config.hidden_size, **MEMORY), layers=[BLOCK], mode="parallel")
    return freeze_base(model)


def with_adapter(model: Any) -> Any:
    dim = model.config.hidden_size
    width = round(multiplications(MemoryConfig(dim=dim, **MEMORY)) / (2 * dim))
    block = model.requires_grad_(False).transformer.h[BLOCK - 1]
    block.mlp = Adapter(block.mlp, dim, width)
    return model


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    blocks = "|".join(str(block - 1) for block in LORA_BLOCKS)
    targets = rf"transformer\.h\.({blocks})\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, fan_in_fan_out=True)
    return get_peft_model(model, config)


METHODS: dict[str, Callable[[Any], Any]] = {
    "memory": with_memory,
    "adapter": with_adapter,
    "lora": with_lora,
    "full": lambda model: model,
}


def adapt(
    base: RunFolder, texts: dict[str, Split], folder: Path, method: str, rate: tuple[float, float], tokens: int
) -> dict[str, Any]:
    """Trains on articles of 2020 and says the loss on held-out ones; the weights that were trained stay on the disk."""
    name = f"{method}-{rate[0]:g}-{rate[1]:g}-{tokens}"
    done = folder / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.manual_seed(SEED)
    model = METHODS[method](base.load_model(torch.device("cpu")))
    step = stepper(model, rate, texts["train"], tokens)
    began = time.perf_counter()
    model.train()
    while next(step, None) is not None:
        pass
    seconds = time.perf_counter() - began
    evaluation = evaluate(model, texts["validation"], tokens=10**9, context=context(model))
    weights = model.eval().state_dict().keys()  # without the marks of row mode
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad and key in weights}
    buffers = dict(model.named_buffers())
    torch.save({key: tensor.detach() for key, tensor in {**trained, **buffers}.items()}, folder / f"{name}.pt")
    result = {
        "method": method,
        "rate": rate,
        "tokens": tokens,
        "trained_parameters": sum(parameter.numel() for parameter in trained.values()),
        "validation_perplexity": evaluation.perplexity,
        "seconds": seconds,
    }
    write_json(done, result)
    return result


def stepper(model: Any, rate: tuple[float, float], text: Split, tokens: int) -> Iterator[float]:
    """Takes the steps of a run, one each time it is asked, on the same windows in the same order for every method."""
    windows = Windows(text, context(model) + 1)
    steps = math.ceil(tokens / (BATCH * context(model)))
    order = training_order(windows, steps * BATCH, SEED)
    optimizer = MemoryAdamW(model, lr=rate[0], value_lr=rate[1] or 1e-3, betas=(0.9, 0.98), schedule_values=True)
    warmup = max(1, steps // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    for step in range(steps):
        numbers = order[step * BATCH : (step + 1) * BATCH]
        ids_BT = torch.stack([windows[int(number)]["input_ids"] for number in numbers])
        loss = batch_loss(model, ids_BT[:, :-1], ids_BT[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        yield loss.item()


def context(model: Any) -> int:
    return model.config.max_position_embeddings


def step_seconds(base: RunFolder, text: Split, steps: int = 15) -> dict[str, float]:
    """Median time of a step of each method, interleaved."""
    plain = base.load_model(torch.device("cpu"))
    steppers = {
        name: stepper(method(copy.deepcopy(plain)).train(), RATES[name][0], text, 10**7)
        for name, method in METHODS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(steps):
        for name, one in steppers.items():
            began = time.perf_counter()
            next(one)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken[3:]) for name, taken in times.items()}


def table(base: RunFolder, texts: dict[str, Split], folder: Path, tokens: int) -> str:
    """Test perplexities with the rates that were best in validation, in Markdown."""
    old = open_corpus(folder / "corpus").test
    seconds = step_seconds(base, texts["train"])
    lines = [
        f"| {tokens:,} tokens of 2020 | trained parameters | rate | step, x memory | validation 2020 | test 2020 | "
        f"test until 2018 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]

    def tests(model: Any) -> list[str]:
        splits = (texts["test"], old)
        return [f"{evaluate(model, split, tokens=150_000, context=context(model)).perplexity:.1f}" for split in splits]

    plain = base.load_model(torch.device("cpu"))
    validation = evaluate(plain, texts["validation"], tokens=10**9, context=context(plain)).perplexity
    lines.append("| " + " | ".join(["the base", "-", "-", "-", f"{validation:.1f}", *tests(plain)]) + " |")
    for method in METHODS:
        runs = [adapt(base, texts, folder, method, rate, tokens) for rate in RATES[method]]
        best = min(runs, key=lambda run: run["validation_perplexity"])
        rate = tuple(best["rate"])
        model = METHODS[method](base.load_model(torch.device("cpu")))
        saved = torch.load(folder / f"{method}-{rate[0]:g}-{rate[1]:g}-{tokens}.pt", weights_only=True)
        left = model.load_state_dict(saved, strict=False).unexpected_keys
        assert not left, left
        said = f"{rate[0]:g}" + (f", values {rate[1]:g}" if rate[1] else "")
        cells = [
            method,
            f"{best['trained_parameters']:,}",
            said,
            f"{seconds[method] / seconds['memory']:.2f}",
            f"{best['validation_perplexity']:.1f}",
            *tests(model),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        del model
        gc.collect()
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    auto_cli(main, as_positional=False)
