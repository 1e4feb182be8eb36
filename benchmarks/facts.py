"""Facts learned by a language model, and what it forgets: a memory of which rare rows move against five other ways.

    python benchmarks/facts.py --news news.jsonl.xz --facts bear_big.jsonl.xz --templates bear_big_templates.json \\
        --output runs/facts [--scale tiny] [--only memory]

The base is a small GPT-2 trained on the news articles dated up to 2018. It learns facts (subject, relation, object) by
sentences that end with the object, which alone is in the loss, one a row. Of each relation's sentences the last is
never trained on. After 1, 2, 4 ... 64 exposures of each fact, recall is the share of facts whose object is predicted
whole, by a trained and by the held-out sentence; forgetting is the perplexity on old articles. Ways to learn:

memory         a memory beside the base that says nothing at first; its rows alone move, by plain gradient descent, each
               at a rate by how rarely old training articles read it (slot_rates)
memory_chosen  the same memory; in each step the rows with the best tf-idf move, all at one rate (select_slots)
memory_all     the same memory; all rows that are read move at one rate
lora, adapter (of as many multiplications as the memory, in its place), full: as in retrofit_news.py

Each has rates of its own. The first table shows the one with the best recall by trained sentences after the last
exposure; the second, of all rates and exposures, the best recall by trained sentences before the perplexity on old
validation articles has risen by more than a limit. Held-out sentences and old test articles choose nothing. Every run
is a line of results.jsonl once it is done, with its whole curve, and is not repeated.
"""

import json
import lzma
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from memlayers import MemoryConfig, RowSGD, SlotCounts, add_memory, memory_diff, select_slots, slot_rates
from memlayers.finetuning import facts_batch
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.data import DataConfig, Windows
from memlayers.lm.data.corpus import END_OF_TEXT, Corpus, open_corpus
from memlayers.lm.evaluate import evaluate
from memlayers.lm.run import RunFolder
from memlayers.lm.train import train
from memlayers.optim import MemoryAdamW
from memlayers.values import value_tables
from retrofit_news import Adapter, articles, context, multiplications, year

BATCH = 16  # facts of a step
# Many heads that read two rows each, so that a fact moves many rows a little, and few tokens of old text meet most of
# them. Values are zero: nothing but facts is in them. Queries are normalised by statistics of old text.
MEMORY = {"heads": 32, "topk": 2, "query_dim": 32, "query_norm": "batch", "value_std": 0.0}
FLOOR = 0.005  # of slot_rates
CHOSEN = 500  # rows of a step that memory_chosen moves
FORGOTTEN = (0.01, 0.1, 1.0)  # limits of the old perplexity's rise
ENDS = re.compile(r".*\[X\].* \[Y\]\.?")  # sentences that end with the object


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment."""

    articles: int | None  # of the base's text; None: all up to 2018
    layers: int
    dim: int
    num_subkeys: int
    base_tokens: int
    facts: int
    background: int  # old windows that are counted, a batch each
    old_tokens: int  # of a perplexity
    exposures: tuple[int, ...]
    seeds: tuple[int, ...]
    rates: dict[str, tuple[float, ...]]


SCALES = {
    "tiny": Scale(
        300, 2, 64, 32, 20_000, 24, 30, 2_000, (1, 2), (0,),
        {
            "memory": (400,), "memory_chosen": (100,), "memory_all": (100,), "lora": (1e-2,), "adapter": (1e-2,),
            "full": (1e-3,),
        },
    ),
    "few": Scale(
        None, 4, 128, 512, 3_000_000, 100, 2000, 20_000, (1, 2, 4, 8, 16, 32, 64), (0, 1),
        {
            "memory": (4e4,),
            "memory_chosen": (300,),
            "memory_all": (100,),
            "lora": (3e-3, 1e-2),
            "adapter": (1e-3, 3e-3),
            "full": (1e-4, 3e-4),
        },
    ),
    "small": Scale(
        None, 4, 192, 512, 7_000_000, 1000, 2000, 100_000, (1, 2, 4, 8, 16, 32, 64), (0, 1),
        {
            "memory": (1e4, 2e4, 4e4),
            "memory_chosen": (30, 100, 300),
            "memory_all": (30, 100, 300),
            "lora": (3e-4, 1e-3, 3e-3, 1e-2),
            "adapter": (3e-4, 1e-3, 3e-3, 1e-2),
            "full": (1e-4, 3e-4, 1e-3, 3e-3),
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    prompts: tuple[str, ...]  # what comes before the object, of the trained sentences
    held_out: str
    object: str


def main(
    facts: str,
    templates: str,
    news: str | None = None,
    corpus: str | None = None,
    output: str = "runs/facts",
    scale: str = "small",
    only: str | None = None,
    rate: float | None = None,
    number: int | None = None,
    seed: int | None = None,
) -> None:
    """Prints a line a run and a table at the end.

    Args:
        facts: lines of JSON with rel, sub and obj, packed by xz.
        templates: sentences of each relation, with [X] and [Y].
        news: articles, as retrofit_news.py takes them.
        corpus: a prepared corpus in their place, which is old text.
        output: where runs are kept.
        scale: tiny (two minutes), few (half an hour a seed on one core) or small (a day).
        only: one of the ways to learn.
        rate: in place of the scale's, with only.
        number: of facts, in place of the scale's.
        seed: of facts and their order, in place of the scale's.
    """
    sizes, folder = SCALES[scale], Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    base, old = train_base(news, corpus, folder, sizes)
    tokenizer = old.tokenizer()
    runs = []
    for one in sizes.seeds if seed is None else (seed,):
        learned = sample(facts, templates, number or sizes.facts, one)
        for method, rates in sizes.rates.items():
            for each in (rates if rate is None else (rate,)) if only in (None, method) else ():
                runs.append(learn(base, old, tokenizer, learned, folder, sizes, method, each, one))
                print(json.dumps(runs[-1]), flush=True)
    print(table(runs), frontier(runs), sep="\n\n")


def train_base(news: str | None, corpus: str | None, folder: Path, sizes: Scale) -> tuple[RunFolder, Corpus]:
    """The run of the base, and its text."""
    sources: tuple[str, ...] = ()
    if corpus is None:
        if news is None:
            raise ValueError("news or corpus must be given, got neither")
        sources = (str(old_articles(news, folder, sizes.articles)),)
    config = RunConfig(
        data=DataConfig(sources=sources, vocab_size=8192),
        model=ModelConfig(layers=sizes.layers, dim=sizes.dim, heads=sizes.dim // 32, context=256),
        memory=MemoryConfig(dim=sizes.dim),
        training=TrainingConfig(
            tokens=sizes.base_tokens, batch_tokens=1024, learning_rate=3e-3,
            eval_every_tokens=max(sizes.base_tokens // 7, 1024), eval_tokens=sizes.old_tokens,
        ),
    )  # fmt: skip
    run, text = RunFolder(folder / "base"), Path(corpus or folder / "corpus")
    if not run.finished:
        train(config, run.path, corpus=text if corpus is None else open_corpus(text), resume=run.path.exists())
    return run, open_corpus(text)


def old_articles(news: str, folder: Path, most: int | None) -> Path:
    """Those up to 2018, as a file."""
    file = folder / "until-2018.jsonl"
    if not file.exists():
        aside = file.with_suffix(".partial")
        with aside.open("w", encoding="utf-8") as lines:
            kept = 0
            for article in articles(news):
                if year(article) <= "2018" and (most is None or kept < most):
                    lines.write(json.dumps(article) + "\n")
                    kept += 1
        aside.rename(file)
    return file


def sample(facts: str, templates: str, count: int, seed: int) -> list[Fact]:
    """As many facts of each relation that has two sentences or more which end with the object."""
    known = json.loads(Path(templates).read_text(encoding="utf-8"))
    sentences = {  # each once: some relations have the same one twice, and the last must not be a trained one
        name: list(dict.fromkeys(one for one in entry["templates"] if ENDS.fullmatch(one)))
        for name, entry in known.items()
    }
    by_relation: dict[str, list[dict[str, str]]] = {}
    with lzma.open(facts, "rt", encoding="utf-8") as lines:
        for fact in map(json.loads, filter(str.strip, lines)):
            if len(sentences.get(fact["rel"], ())) >= 2:
                by_relation.setdefault(fact["rel"], []).append(fact)
    draw = random.Random(seed)
    for those in by_relation.values():
        draw.shuffle(those)
    found = []
    while len(found) < count:  # one of each relation in turn
        for relation, those in by_relation.items():
            if those and len(found) < count:
                fact = those.pop()
                prompts = [one.partition(" [Y]")[0].replace("[X]", fact["sub"]) for one in sentences[relation]]
                found.append(Fact(tuple(prompts[:-1]), prompts[-1], fact["obj"]))
    return found


def batch_of(tokenizer: Any, facts: list[Fact], prompts: list[str]) -> dict[str, Tensor]:
    """As documents of the base begin. The end is not in the loss: that a text ends is nothing to learn here."""
    batch = facts_batch(tokenizer, [END_OF_TEXT + one for one in prompts], [" " + fact.object for fact in facts])
    batch["labels"][torch.arange(len(facts)), batch["attention_mask"].sum(1) - 1] = -100
    return batch


def training_batches(tokenizer: Any, facts: list[Fact], exposure: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """All facts once, each by one of its trained sentences."""
    order = list(enumerate(facts))
    random.Random(1000 * seed + exposure).shuffle(order)
    for first in range(0, len(order), BATCH):
        some = order[first : first + BATCH]
        prompts = [fact.prompts[(number + exposure) % len(fact.prompts)] for number, fact in some]
        yield batch_of(tokenizer, [fact for _, fact in some], prompts)


@torch.no_grad()
def recall(model: Any, tokenizer: Any, facts: list[Fact], prompt: Callable[[Fact], str]) -> float:
    """The share of facts all tokens of whose object are the most likely ones."""
    right = 0
    for first in range(0, len(facts), 64):
        some = facts[first : first + 64]
        batch = batch_of(tokenizer, some, [prompt(fact) for fact in some])
        labels = batch.pop("labels")
        guessed = model(**batch).logits[:, :-1].argmax(-1)
        right += int(((guessed == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).sum())
    return right / len(facts)


def old_windows(old: Corpus, context: int, count: int, seed: int) -> list[Tensor]:
    windows = Windows(old.train, context)
    return [windows[number]["input_ids"] for number in random.Random(seed).sample(range(len(windows)), count)]


def with_memory(model: Any, old: Corpus, sizes: Scale) -> Any:
    """A memory beside the third quarter's feed-forward network, the same each time, that says nothing yet."""
    torch.manual_seed(0)
    config = MemoryConfig(dim=sizes.dim, num_subkeys=sizes.num_subkeys, **MEMORY)
    add_memory(model, config, layers=[sizes.layers - 1], mode="parallel")
    nn.init.ones_(memory_block(model).mlp.gate)
    texts = torch.stack(old_windows(old, context(model), 160, seed=1))
    update_bn(texts.split(8), model)
    return model.eval()


def background(model: Any, old: Corpus, folder: Path, sizes: Scale) -> SlotCounts:
    """Reads of old training articles, counted once."""
    counts, file = SlotCounts(model), folder / "counts.safetensors"
    if file.exists():
        return counts.load(file)
    with counts, torch.no_grad():
        for window in old_windows(old, context(model), sizes.background, seed=0):
            model(input_ids=window[None])
    counts.save(file)
    return counts


def prepared(method: str, model: Any, rate: float, sizes: Scale) -> tuple[Any, torch.optim.Optimizer]:
    """The model that learns, and its optimizer."""
    if method.startswith("memory"):
        return model, RowSGD(model, lr=rate)  # the rows alone; the selector stays, so that old text reads what it read
    if method == "adapter":
        block, config = memory_block(model), MemoryConfig(dim=sizes.dim, num_subkeys=sizes.num_subkeys, **MEMORY)
        block.mlp = Adapter(block.mlp, config.dim, max(1, round(multiplications(config) / (2 * config.dim))))
        model.requires_grad_(False)
        for part in (block.mlp.down, block.mlp.up):
            part.requires_grad_(True)
    elif method == "lora":
        model = lora(model)
    return model, MemoryAdamW(model, lr=rate)


def memory_block(model: Any) -> Any:
    return model.transformer.h[len(model.transformer.h) - 2]


def lora(model: Any) -> nn.Module:
    """On attention and feed-forward networks of all blocks."""
    from peft import LoraConfig, get_peft_model

    targets = r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, fan_in_fan_out=True))


def learn(
    base: RunFolder, old: Corpus, tokenizer: Any, facts: list[Fact], folder: Path, sizes: Scale,
    method: str, rate: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One run, or what is known of it."""
    what = {"method": method, "rate": rate, "seed": seed, "facts": len(facts)}
    results = folder / "results.jsonl"
    for line in results.read_text().splitlines() if results.exists() else ():
        if (found := json.loads(line)) | what == found:
            return found
    has_memory = method.startswith("memory")
    plain, model = base.load_model(), base.load_model()
    if has_memory:
        plain, model = with_memory(plain, old, sizes), with_memory(model, old, sizes)
        model.requires_grad_(False)
        value_tables(model)[0].weight.requires_grad_(True)
        counts, step_reads = background(plain, old, folder, sizes), SlotCounts(model)
    torch.manual_seed(seed)
    model, optimizer = prepared(method, model, rate, sizes)
    if method == "memory":
        optimizer.choose_rows(slot_rates(model, counts, floor=FLOOR))
    curve, began, tokens, exposed = [], time.perf_counter(), 0, 0
    for until in (0, *sizes.exposures):
        model.train(not has_memory)  # the statistics of queries stay, too
        for exposure in range(exposed, until):
            for batch in training_batches(tokenizer, facts, exposure, seed):
                with step_reads if method == "memory_chosen" else nullcontext():
                    model(**batch).loss.backward()
                if method == "memory_chosen":
                    optimizer.choose_rows(select_slots(model, counts, step_reads, slots=CHOSEN))
                    step_reads.reset()
                optimizer.step()
                optimizer.zero_grad()
                tokens += int(batch["attention_mask"].sum())
        exposed = until
        model.eval()
        perplexities = {
            f"old_{name}_perplexity": evaluate(
                model, getattr(old, name), tokens=sizes.old_tokens, context=context(plain)
            ).perplexity
            for name in ("validation", "test")
        }
        curve.append(
            {
                "exposures": until,
                "trained": recall(model, tokenizer, facts, lambda fact: fact.prompts[0]),
                "held_out": recall(model, tokenizer, facts, lambda fact: fact.held_out),
                **perplexities,
            }
        )
    result = {
        **what,
        "trained_parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "tokens": tokens,
        "seconds": round(time.perf_counter() - began, 1),
        **shipped(method, model, plain),
        "scale": asdict(sizes),
        "curve": curve,
    }
    with results.open("a") as lines:
        lines.write(json.dumps(result) + "\n")
    return result


def shipped(method: str, model: Any, plain: Any) -> dict[str, int]:
    """Rows that were changed, and bytes of what would be sent to others."""
    if method.startswith("memory"):
        patch = memory_diff(model, plain)
        return {"rows_changed": patch.rows, "patch_bytes": patch.nbytes}
    trained = [one for one in model.parameters() if one.requires_grad]
    return {"rows_changed": 0, "patch_bytes": sum(one.nbytes for one in trained)}


def table(runs: list[dict[str, Any]]) -> str:
    """The chosen rate of each way to learn, by seed, in Markdown."""
    lines = [
        "| | seed | rate | trained parameters | rows changed | bytes to ship | trained sentences | held-out sentences "
        "| old test perplexity | before |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, seed in dict.fromkeys((run["method"], run["seed"]) for run in runs):
        those = [run for run in runs if (run["method"], run["seed"]) == (method, seed)]
        best = max(those, key=lambda run: run["curve"][-1]["trained"])
        first, last = best["curve"][0], best["curve"][-1]
        cells = [
            method, f"{seed}", f"{best['rate']:g}", f"{best['trained_parameters']:,}", f"{best['rows_changed']:,}",
            f"{best['patch_bytes']:,}", f"{last['trained']:.1%}", f"{last['held_out']:.1%}",
            f"{last['old_test_perplexity']:.1f}", f"{first['old_test_perplexity']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def frontier(runs: list[dict[str, Any]]) -> str:
    """What each way knows before it has forgotten more than a limit, of all its rates and exposures, in Markdown."""
    lines = [
        "| | seed | " + " | ".join(f"up by at most {limit:.0%}" for limit in FORGOTTEN) + " | whatever it costs |",
        "|---|---:|" + "---:|" * (len(FORGOTTEN) + 1),
    ]
    for method, seed in dict.fromkeys((run["method"], run["seed"]) for run in runs):
        points = [
            (point, point[name := "old_validation_perplexity"] / run["curve"][0][name] - 1, run)
            for run in runs
            if (run["method"], run["seed"]) == (method, seed)
            for point in run["curve"]
        ]
        cells = []
        for limit in (*FORGOTTEN, math.inf):
            best, _, run = max((one for one in points if one[1] <= limit), key=lambda one: one[0]["trained"])
            up = best["old_test_perplexity"] / run["curve"][0]["old_test_perplexity"] - 1
            cells.append(f"{best['held_out']:.1%} ({best['trained']:.1%}), test {up:+.1%}")
        lines.append("| " + " | ".join([method, f"{seed}", *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    auto_cli(main, as_positional=False)
