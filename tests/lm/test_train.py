import dataclasses
import itertools
import json
import math
import shutil
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlayers.lm.train as module
from memlayers import Experts, MemoryLayer, MemoryPlus
from memlayers.files import write_sealed
from memlayers.layer import memory_layers
from memlayers.lm.build import build_model, resolve_precision
from memlayers.lm.data import DataConfig, Windows, prepare, training_order
from memlayers.lm.evaluate import evaluate
from memlayers.lm.faults import TrainingFault
from memlayers.lm.footprint import Footprint
from memlayers.lm.run import RunFolder
from memlayers.lm.train import Loop, train
from memlayers.optim import MemoryAdamW, row_adam
from memlayers.parameters import count_parameters


def variant(config, *, model=None, training=None, **fields):
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **(model or {})),
        training=dataclasses.replace(config.training, **(training or {})),
        **fields,
    )


@pytest.fixture
def batches(monkeypatch):
    """The batches that models are trained on, in order."""
    seen = []
    original = module.batch_loss

    def record(model, inputs_BT, labels_BT):
        seen.append(inputs_BT.clone())
        return original(model, inputs_BT, labels_BT)

    monkeypatch.setattr(module, "batch_loss", record)
    return seen


def test_a_finished_run_has_all_its_parts(tiny_run, tiny_corpus):
    folder = RunFolder(tiny_run)
    assert folder.finished
    assert list(folder.tensorboard.iterdir())
    result, config = folder.read_result(), folder.read_config()
    assert result["config"] == config.to_dict()
    assert result["seed"] == config.training.seed
    assert result["versions"].keys() >= {"python", "memlayers", "torch", "transformers", "tokenizers"}
    assert result["hardware"]["threads"] == torch.get_num_threads()
    assert result["command"]
    assert result["data"]["corpus_sha256"] == tiny_corpus.manifest["corpus_sha256"]
    assert result["data"]["epochs"] > 0
    model = build_model(config, vocab_size=tiny_corpus.vocab_size, eot_id=0, device="meta")
    assert result["parameters"] == count_parameters(model)
    training = result["training"]
    assert (training["steps"], training["tokens"]) == (40, 40 * 64)
    assert training["tokens_per_s"] == pytest.approx(training["tokens"] / training["seconds"])
    words = tiny_corpus.train.num_words / tiny_corpus.train.num_tokens
    assert training["words_per_s"] == pytest.approx(training["tokens_per_s"] * words)
    assert not list(tiny_run.glob("*.partial"))


def test_the_model_learns(tiny_run):
    curve = RunFolder(tiny_run).read_result()["curve"]
    assert [point["step"] for point in curve] == [4 * number for number in range(1, 11)]
    assert [point["tokens"] for point in curve] == [4 * 64 * number for number in range(1, 11)]
    assert all(after["seconds"] > before["seconds"] for before, after in itertools.pairwise(curve))
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.3


def test_the_saved_model_is_the_one_that_was_evaluated(tiny_run, tiny_corpus):
    result = RunFolder(tiny_run).read_result()
    model = RunFolder(tiny_run).load_model()
    again = evaluate(model, tiny_corpus.validation, tokens=300, context=16)
    assert again.nll == pytest.approx(result["validation"]["nll"], rel=1e-6)
    assert again.usage == result["validation"]["usage"]
    assert result["curve"][-1]["loss"] == result["validation"]["loss"]


def test_the_saved_model_has_its_tokenizer_and_its_cache(tiny_run, tiny_corpus):
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "model")
    text = "abc jdf"
    assert tokenizer.encode(text) == tiny_corpus.tokenizer().encode(text)
    assert tokenizer.eos_token_id == tiny_corpus.eot_id
    model = AutoModelForCausalLM.from_pretrained(tiny_run / "model")
    assert model.config.use_cache is True
    assert model.config.eos_token_id == tiny_corpus.eot_id


def test_the_log_has_rates_and_usage_of_every_window(tiny_run):
    lines = RunFolder(tiny_run).read_metrics()
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert [line["tokens"] for line in steps] == [64 * step for step in range(1, 41)]
    for line in steps:
        assert line["tokens_per_s"] > line["words_per_s"] > 0
        assert 0 < line["usage/transformer.h.1.mlp.memory"] <= 100
        assert 0 <= line["kl/transformer.h.1.mlp.memory"] <= math.log(16)
        assert 0 < line["top1_usage/transformer.h.1.mlp.memory"] <= line["usage/transformer.h.1.mlp.memory"]
    # Warm-up over the first 2 of 40 steps, then a cosine towards 0.
    rates = [line["learning_rate"] for line in steps]
    assert rates[:3] == pytest.approx([0, 0.005, 0.01])
    assert all(after < before for before, after in itertools.pairwise(rates[2:]))
    assert rates[-1] < 1e-4
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [4 * number for number in range(1, 11)]
    assert all(line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"])) for line in evaluations)
    assert all("eval_usage/transformer.h.1.mlp.memory" in line for line in evaluations)


def test_usage_is_of_the_last_window_of_the_log_alone(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    measured = []
    original = module.UsageMeter.report

    def report(self):
        measured.append(original(self))
        return measured[-1]

    monkeypatch.setattr(module.UsageMeter, "report", report)
    train(tiny_config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    # Six steps of 64 tokens are logged one by one; the evaluations in between count apart.
    evaluated = tiny_corpus.validation.prefix(300).num_tokens - 1
    assert [each.tokens for each in measured] == [64, 64, 64, 64, evaluated, 64, 64, evaluated]


def test_every_model_sees_the_same_tokens_in_the_same_order(tiny_config, tiny_corpus, tmp_path, batches):
    configs = {
        "memory": tiny_config,
        "plain": variant(tiny_config, memory_layers=()),
        "deep, with draws of its own": variant(tiny_config, model={"layers": 4, "dropout": 0.3}, memory_layers=()),
    }
    orders, hashes = {}, {}
    for name, config in configs.items():
        batches.clear()
        result = train(config, tmp_path / name, corpus=tiny_corpus, progress=False)
        orders[name] = torch.stack(batches)
        hashes[name] = result["data"]["order_sha256"]
    windows = torch.from_numpy(tiny_corpus.train.tokens.astype(np.int64)).unfold(0, 17, 17)
    order = torch.from_numpy(training_order(Windows(tiny_corpus.train, 17), 6 * 4, seed=0).astype(np.int64))
    assert torch.equal(orders["memory"], windows[order, :16].view(6, 4, 16))
    for name in configs:
        assert torch.equal(orders[name], orders["memory"]), name
        assert hashes[name] == hashes["memory"], name

    batches.clear()
    other = train(variant(tiny_config, training={"seed": 1}), tmp_path / "seed", corpus=tiny_corpus, progress=False)
    assert not torch.equal(torch.stack(batches), orders["memory"])
    assert other["data"]["order_sha256"] != hashes["memory"]


def test_all_positions_are_trained(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    pairs = []
    original = module._collate

    def collate(items):
        pairs.append(original(items))
        return pairs[-1]

    monkeypatch.setattr(module, "_collate", collate)
    train(tiny_config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert len(pairs) == 6
    for inputs_BT, labels_BT in pairs:
        assert inputs_BT.shape == labels_BT.shape == (4, 16)
        assert torch.equal(inputs_BT[:, 1:], labels_BT[:, :-1])


def test_a_run_can_be_repeated(tiny_config, tiny_corpus, tmp_path):
    def losses(name):
        train(tiny_config, tmp_path / name, corpus=tiny_corpus, progress=False)
        return [(line.get("loss"), line.get("eval_loss")) for line in RunFolder(tmp_path / name).read_metrics()]

    first = losses("first")
    torch.manual_seed(99)  # what the process drew before does not matter
    assert losses("second") == first


def test_a_text_that_runs_out_is_seen_again_and_that_is_said(tiny_config, tiny_corpus, tmp_path):
    windows = tiny_corpus.train.num_tokens // 17
    config = variant(
        tiny_config, training={"tokens": 16 * 2 * windows, "batch_tokens": 16 * 64, "eval_every_tokens": 10**6}
    )
    said = []
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, say=said.append)
    assert result["data"]["epochs"] >= 2
    folder = str(tiny_corpus.folder)
    assert said == [f"training.tokens are 2.0 times the training text of {folder!r}: text is seen again"]


def test_evaluation_is_not_training_time(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    late = 0.0
    clock = time.perf_counter

    def slow_evaluate(*args, **kwargs):
        nonlocal late
        late += 1000.0
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("memlayers.lm.metrics.time.perf_counter", lambda: clock() + late)
    monkeypatch.setattr(module, "evaluate", slow_evaluate)
    result = train(tiny_config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert late == 2000.0
    assert 0 < result["training"]["seconds"] < 1000
    assert all(line["seconds"] < 1000 for line in RunFolder(tmp_path / "run").read_metrics())


NOTHING = Footprint(parameters=0, gradients=0, optimizer_state=0, activations=0)


@pytest.mark.parametrize("values_follow", [False, True])
@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt", "constant"])
def test_values_and_selector_learn_at_their_own_rates(
    tiny_config, tiny_corpus, tmp_path, monkeypatch, schedule, values_follow
):
    rates, selector, values = [], [], []
    step, update = MemoryAdamW.step, row_adam.row_adam_

    def record_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        selector.append(self.param_groups[2]["lr"])
        return step(self, *args, **kwargs)

    def record_update(*args, **kwargs):
        values.append(kwargs["lr"])
        return update(*args, **kwargs)

    # What is estimated on fake tensors before is no step of the run.
    monkeypatch.setattr("memlayers.lm.train.require_memory", lambda *args, **kwargs: NOTHING)
    monkeypatch.setattr(MemoryAdamW, "step", record_step)
    monkeypatch.setattr(row_adam, "row_adam_", record_update)
    training = {"schedule": schedule, "value_learning_rate": 0.07, "selector_learning_rate": 1e-3, "warmup": 2}
    training["value_schedule"] = "same" if values_follow else "constant"
    train(variant(tiny_config, training=training), tmp_path / "run", corpus=tiny_corpus, progress=False)
    expected = {
        "cosine": [0.0, 0.5, 1.0, 0.854, 0.5, 0.146],
        "inverse_sqrt": [0.0, 0.5, 1.0, math.sqrt(2 / 3), math.sqrt(2 / 4), math.sqrt(2 / 5)],
        "constant": [0.0, 0.5, 1.0, 1.0, 1.0, 1.0],
    }
    assert [rate / 1e-2 for rate in rates] == pytest.approx(expected[schedule], abs=1e-3)
    assert [rate / 1e-3 for rate in selector] == pytest.approx(expected[schedule], abs=1e-3)
    assert [rate / 0.07 for rate in values] == pytest.approx(expected[schedule] if values_follow else [1] * 6, abs=1e-3)


@pytest.mark.parametrize("kind", ["memory", "memory_plus", "experts"])
@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_memories_of_a_run_have_a_kind_and_a_mode_and_may_share_a_table(tiny_config, kind, mode):
    config = variant(tiny_config, memory_layers=(1, 2), memory_kind=kind, memory_mode=mode)
    expected = {"memory": MemoryLayer, "memory_plus": MemoryPlus, "experts": Experts}[kind]
    for is_shared in (False, True):
        model = build_model(dataclasses.replace(config, memory_share_values=is_shared), vocab_size=300, eot_id=0)
        first, second = memory_layers(model).values()
        assert type(first) is type(second) is expected
        assert (first.values is second.values) is is_shared
        assert hasattr(model.transformer.h[0].mlp, "gate") is (mode == "parallel")


def test_memories_that_share_a_table_train_and_resume(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    """A frozen selector, and values on the schedule, at that: what a checkpoint must hold is more than by default."""
    training = {"value_schedule": "same", "selector_learning_rate": 0.0, "save_every_tokens": 128}
    memory = {"memory_layers": (1, 2), "memory_kind": "experts", "memory_mode": "parallel"}
    config = variant(tiny_config, training=training, memory_share_values=True, **memory)
    whole = train(config, tmp_path / "whole", corpus=tiny_corpus, progress=False)
    finish = Loop.finish_step

    def stop(self, line):
        result = finish(self, line)
        if self.step == 3:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "finish_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    said = []
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    assert said == ["going on from the checkpoint of step 2"]
    assert result["validation"] == whole["validation"]
    assert result["parameters"]["values"] == 2 * 16 * 16  # what experts listen to, and what they say
    first, second = memory_layers(RunFolder(tmp_path / "run").load_model()).values()
    assert first.values is second.values
    torch.manual_seed(tiny_config.training.seed)
    fresh = build_model(config, vocab_size=tiny_corpus.vocab_size, eot_id=tiny_corpus.eot_id)
    for before, after in zip(memory_layers(fresh).values(), (first, second), strict=True):
        assert torch.equal(before.keys.weight, after.keys.weight)
        assert torch.equal(before.query.projections[0].weight, after.query.projections[0].weight)
        assert torch.equal(before.query.norm.weight, after.query.norm.weight)
        assert not torch.equal(before.query.norm.running_mean, after.query.norm.running_mean)
        assert not torch.equal(before.values.inputs.weight, after.values.inputs.weight)


def test_llama_trains_too(tiny_config, tiny_corpus, tmp_path):
    config = variant(tiny_config, model={"family": "llama"})
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert result["validation"]["usage"].keys() == {"model.layers.1.mlp.memory"}
    again = evaluate(RunFolder(tmp_path / "run").load_model(), tiny_corpus.validation, tokens=300, context=16)
    assert again.nll == pytest.approx(result["validation"]["nll"], rel=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    enabled = []
    original = Loop.run

    def run(self, **options):
        enabled.append(all(block.gradient_checkpointing for block in self.model.transformer.h))
        return original(self, **options)

    monkeypatch.setattr(Loop, "run", run)
    plain, checkpointed = (
        train(
            variant(tiny_config, training={"gradient_checkpointing": flag}),
            tmp_path / str(flag),
            corpus=tiny_corpus,
            progress=False,
        )
        for flag in (False, True)
    )
    assert enabled == [False, True]
    assert checkpointed["validation"]["nll"] == pytest.approx(plain["validation"]["nll"], rel=1e-5)


def test_bfloat16_is_mixed_precision(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    original, dtypes = module.batch_loss, set()

    def record(*args):
        loss = original(*args)
        dtypes.add((loss.dtype, args[0](input_ids=args[1]).logits.dtype))
        return loss

    monkeypatch.setattr(module, "batch_loss", record)
    config = variant(tiny_config, training={"precision": "bf16"})
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert result["precision"] == "bf16"
    assert dtypes == {(torch.float32, torch.bfloat16)}
    assert math.isfinite(result["validation"]["loss"])
    assert {value.dtype for value in RunFolder(tmp_path / "run").load_model().parameters()} == {torch.float32}


def test_a_folder_with_a_run_is_left_alone(tiny_run, tiny_config, tiny_corpus, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    message = "output must be a folder without a run, .* holds a finished run"
    with pytest.raises(ValueError, match=message):
        train(tiny_config, tiny_run, corpus=tmp_path / "not prepared for this", progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        RunFolder(tiny_run).start(tiny_config)
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        train(tiny_config, file, corpus=tiny_corpus, progress=False)


def test_a_run_that_did_not_finish_is_replaced_only_on_demand(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def end(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_model", end)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config, folder.path, corpus=tiny_corpus, progress=False)
    assert folder.begun
    assert not folder.finished
    note = folder.path / "note.txt"
    note.write_text("not ours")
    with pytest.raises(ValueError, match="which holds a run that did not finish"):
        train(tiny_config, folder.path, corpus=tiny_corpus, progress=False)
    train(tiny_config, folder.path, corpus=tiny_corpus, overwrite=True, progress=False)
    assert folder.finished
    assert [line["step"] for line in folder.read_metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert note.read_text() == "not ours"


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"model": {"context": 10**6}, "training": {"batch_tokens": 10**6}}, {}, "model.context must be below"),
        (
            {"training": {"precision": "fp16"}, "memory_layers": ()},
            {},
            "training.precision must be .* on cpu, got 'fp16'",
        ),
        ({"training": {"tokens": 10**15}}, {}, "training.tokens must be fewer: the order of .* windows alone"),
        ({"training": {"batch_tokens": 16 * 10**12}}, {}, "training.batch_tokens must be fewer: .* got 16,000,000,000"),
        ({}, {"WORLD_SIZE": "2"}, "RANK must be set where WORLD_SIZE is 2: start the command with torchrun"),
        ({}, {"WORLD_SIZE": "many"}, "WORLD_SIZE must be an integer of at least 1, got 'many'"),
    ],
)
def test_what_cannot_work_ends_before_anything_is_written(
    tiny_config, tiny_corpus, tmp_path, monkeypatch, changes, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        train(variant(tiny_config, **changes), tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def half(monkeypatch):
    """Float16 with a loss scaler on the CPU, for which the command has no such precision."""
    monkeypatch.setattr(module, "resolve_precision", lambda asked, device: "fp16")


def overflow_at(monkeypatch, steps):
    """Have the gradients of these steps overflow, counted from 1."""
    original = Loop.forward_backward

    def forward_backward(self, batches):
        loss = original(self, batches)
        if self.step + 1 in steps:
            next(self.model.parameters()).grad[0] = math.inf
        return loss

    monkeypatch.setattr(Loop, "forward_backward", forward_backward)


def test_a_step_that_overflows_in_float16_is_not_made_and_halves_the_scale(
    tiny_config, tiny_corpus, tmp_path, monkeypatch, half
):
    scales, weights = [], []
    original = Loop.finish_step

    def record(self, line):
        scales.append(self.scaler.get_scale())
        weights.append(self.model.transformer.wte.weight.detach().clone())
        return original(self, line)

    monkeypatch.setattr(Loop, "finish_step", record)
    overflow_at(monkeypatch, {4})
    config = variant(tiny_config, memory_layers=())
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert result["precision"] == "fp16"
    assert scales == [65536.0] * 3 + [32768.0] * 3
    assert torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[4], weights[3])
    lines = RunFolder(tmp_path / "run").read_metrics()
    assert [line["grad_norm"] is None for line in lines] == [False, False, False, True, False, False]
    rates = [line["learning_rate"] for line in lines]
    assert rates[4] == rates[3] != rates[5]  # the schedule waits


def test_float16_that_overflows_again_and_again_ends_the_run(tiny_config, tiny_corpus, tmp_path, monkeypatch, half):
    monkeypatch.setattr(module, "FP16_PATIENCE", 2)
    overflow_at(monkeypatch, {2, 3, 4})
    with pytest.raises(TrainingFault, match="at step 4 of 6: .* its gradient is not finite"):
        train(variant(tiny_config, memory_layers=()), tmp_path / "run", corpus=tiny_corpus, progress=False)


def test_automatic_precision(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_precision("auto", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_precision("auto", gpu) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_precision("auto", gpu) == "fp32"
    assert resolve_precision("fp16", gpu) == "fp16"


def test_a_seed_decides_the_first_weights(tiny_config):
    def first(seed):
        torch.manual_seed(seed)
        return build_model(tiny_config, vocab_size=300, eot_id=0).state_dict()

    one, same, other = first(0), first(0), first(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


def test_a_damaged_run_is_named(tiny_config, tiny_corpus, tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"run must be the folder of a run, .* it has no result.json"):
        folder.read_result()
    with pytest.raises(ValueError, match="run must be the folder of a finished run"):
        folder.load_model()
    folder.config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged: "):
        folder.read_config()
    folder.result.write_text("{}")
    with pytest.raises(ValueError, match=r"result.json is damaged: "):
        folder.read_config()


def test_a_model_whose_files_have_hashes_alone_is_verified_too(tiny_run, tmp_path):
    """As results of 0.1.0 are."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(tiny_run, folder.path)
    result = folder.read_result()
    write_sealed(folder.result, {**result, "model_files": {n: d["sha256"] for n, d in result["model_files"].items()}})
    assert folder.load_model() is not None
    (folder.model / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match="generation_config.json is damaged: it is not what was written"):
        folder.load_model()


def test_a_damaged_model_is_refused_by_name(tiny_run, tmp_path):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(tiny_run, folder.path)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        file = folder.model / name
        good = file.read_bytes()
        for damaged in (good[:-1], good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]):
            file.write_bytes(damaged)
            for load in (folder.load_model, folder.load_tokenizer):
                with pytest.raises(ValueError, match=f"{name} is damaged"):
                    load()
        file.unlink()
        with pytest.raises(ValueError, match=f"{name} is damaged: it is missing"):
            folder.load_model()
        file.write_bytes(good)
    assert folder.load_model() is not None


# A run that begins with the model of another one


def further(config, first, **changes):
    settings = {"begin_with": str(first), "tokens": 64 * 2, "eval_every_tokens": 64, **changes}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **settings))


@pytest.mark.promise(
    "Command line and files",
    "more tokens for a finished run, or other text",
    "supported",
    "a new run with `--training.begin_with RUN` has its model, and a schedule and moments of its own; "
    "`--data.tokenizer RUN` prepares other text for it",
)
def test_a_run_begins_with_the_model_of_another_one(tiny_config, tiny_corpus, tiny_run, tmp_path):
    config = further(tiny_config, tiny_run, learning_rate=1e-12, value_learning_rate=1e-12, weight_decay=0.0)
    train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    first, second = (RunFolder(folder).load_model().state_dict() for folder in (tiny_run, tmp_path / "run"))
    for name, value in first.items():
        if "running" not in name and "num_batches" not in name:  # statistics have moved
            torch.testing.assert_close(second[name], value, rtol=0, atol=1e-9)
    lines = RunFolder(tmp_path / "run").read_metrics()
    assert [line["step"] for line in lines] == [1, 2]
    assert RunFolder(tmp_path / "run").read_result()["config"]["training"]["begin_with"] == str(tiny_run)


def test_a_run_that_began_with_another_one_goes_on(tiny_config, tiny_corpus, tiny_run, tmp_path, monkeypatch):
    config = further(tiny_config, tiny_run, tokens=64 * 4)
    train(config, tmp_path / "whole", corpus=tiny_corpus, progress=False)
    original = Loop.forward_backward

    def interrupted(self, batches):
        if self.step == 2:
            raise KeyboardInterrupt
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "forward_backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True)
    runs = [RunFolder(tmp_path / name) for name in ("whole", "run")]
    losses = [[line["loss"] for line in run.read_metrics()] for run in runs]
    assert losses[0] == losses[1]
    whole, resumed = (run.read_result() for run in runs)
    assert whole["model_files"] == resumed["model_files"]  # with the hashes of their bytes
    quality = [[(point["step"], point["loss"]) for point in result["curve"]] for result in (whole, resumed)]
    assert quality[0] == quality[1]
    assert [step for step, _ in quality[0]] == [0, 1, 2, 3, 4]  # the first is of the model that it began with


def test_the_model_to_begin_with_must_be_the_same_and_there(tiny_config, tiny_corpus, tiny_run, tmp_path):
    other = dataclasses.replace(
        further(tiny_config, tiny_run), memory=dataclasses.replace(tiny_config.memory, num_subkeys=8)
    )
    for config, message in (
        (further(tiny_config, tmp_path / "none"), "training.begin_with must be the folder of a finished run, got"),
        (other, "training.begin_with must be a run of the same model; .* memory.num_subkeys: 4, 8"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_take_the_place_of_the_model_that_it_begins_with(tiny_config, tiny_corpus, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (tmp_path / "link").symlink_to(run)
    for first in (run, tmp_path / "link", run / ".." / "run"):
        with pytest.raises(ValueError, match="output must be another folder than .* in training.begin_with"):
            train(further(tiny_config, first), run, corpus=tiny_corpus, overwrite=True, progress=False)
    RunFolder(run).verify_model()
    train(further(tiny_config, tiny_run), run, corpus=tiny_corpus, overwrite=True, progress=False)


def test_other_text_has_the_tokens_of_the_first_run(tiny_config, tiny_run, tmp_path):
    text = tmp_path / "other.jsonl"
    text.write_text("".join(json.dumps({"id": n, "text": f"abc def {n} " * 20}) + "\n" for n in range(60)))
    data = DataConfig(sources=(str(text),), holdout_percent=10, vocab_size=300)
    config = dataclasses.replace(further(tiny_config, tiny_run), data=data)
    with pytest.raises(ValueError, match=f"another one: prepare the text with --data.tokenizer {tiny_run}"):
        train(config, tmp_path / "a" / "run", progress=False)
    config = dataclasses.replace(config, data=dataclasses.replace(data, tokenizer=str(tiny_run)))
    train(config, tmp_path / "b" / "run", progress=False)
    first, second = (RunFolder(folder).load_tokenizer().get_vocab() for folder in (tiny_run, tmp_path / "b" / "run"))
    assert first == second
    train(config, tmp_path / "b" / "run", progress=False, resume=True)  # whose corpus is asked for again
    with pytest.raises(ValueError, match="holds a corpus that was prepared otherwise: tokenizer '.*', asked for None"):
        prepare(data, tmp_path / "b" / "corpus", progress=False)
    with pytest.raises(ValueError, match="data.tokenizer must be the folder of a corpus, run or model with"):
        prepare(dataclasses.replace(data, tokenizer=str(tmp_path)), tmp_path / "c", progress=False)
