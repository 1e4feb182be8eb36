import dataclasses
import json
import math

import pytest
import torch

from memlayers.lm.build import batch_loss, build_model
from memlayers.lm.data.windows import Windows
from memlayers.lm.dry_run import dry_run
from memlayers.lm.footprint import footprint


def quiet(line):
    pass


def with_training(config, **changes):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def test_a_dry_run_says_what_the_run_needs(tiny_config, tiny_corpus):
    found = dry_run(tiny_config, corpus=tiny_corpus, say=quiet)
    need = footprint(tiny_config, vocab_size=tiny_corpus.vocab_size)
    assert found.footprint == need
    assert found.parameters["values"] == 16 * 16
    assert (found.tokens, found.steps) == (64 * 6, 6)
    assert (found.evaluations, found.checkpoints) == (
        2,
        1,
    )  # evaluations after steps 4 and 6, a checkpoint after step 4
    assert found.checkpoint_bytes == need.parameters + need.optimizer_state
    assert found.training_seconds == pytest.approx(6 * found.step_seconds)
    assert found.evaluation_seconds == pytest.approx(2 * 300 / 64 * found.step_seconds / 3)
    assert found.tokens_per_s == pytest.approx(64 / found.step_seconds)
    assert found.real_text


def test_its_step_is_the_second_one_of_the_same_batch(tiny_config, tiny_corpus):
    windows = Windows(tiny_corpus.train, 17)
    batch_BT = torch.stack([windows[number]["input_ids"] for number in range(4)])
    torch.manual_seed(tiny_config.training.seed)
    model = build_model(tiny_config, vocab_size=tiny_corpus.vocab_size, eot_id=tiny_corpus.eot_id).train()
    first = batch_loss(model, batch_BT[:, :-1], batch_BT[:, 1:]).item()
    still = dry_run(
        with_training(tiny_config, learning_rate=1e-12, value_learning_rate=1e-12), corpus=tiny_corpus, say=quiet
    )
    moved = dry_run(tiny_config, corpus=tiny_corpus, say=quiet)
    assert still.loss == pytest.approx(first, rel=1e-5)
    assert moved.loss < first - 1e-3


def test_parts_of_a_step_have_the_loss_of_the_whole(tiny_config, tiny_corpus):
    plain = dataclasses.replace(tiny_config, memory_layers=())
    whole, parts = (
        dry_run(with_training(plain, accumulate=accumulate), corpus=tiny_corpus, say=quiet) for accumulate in (1, 4)
    )
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"max_grad_norm": 0.0}])
def test_the_settings_of_a_step_are_taken(tiny_config, tiny_corpus, changes):
    found = dry_run(with_training(tiny_config, **changes), corpus=tiny_corpus, say=quiet)
    assert math.isfinite(found.loss)
    assert found.precision == changes.get("precision", "fp32")


def test_without_a_corpus_the_step_reads_random_tokens_and_says_so(tiny_config):
    said = []
    found = dry_run(tiny_config, corpus=None, say=said.append)
    assert not found.real_text
    assert any("random tokens" in line for line in said)
    assert any("random tokens" in text for _, text in found.lines())
    assert found.loss == pytest.approx(math.log(300), rel=0.1)


def test_nothing_is_written_and_random_numbers_are_as_before(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    dry_run(tiny_config, corpus=None, say=quiet)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_its_figures_are_json_and_lines(tiny_config):
    found = dry_run(tiny_config, corpus=None, say=quiet)
    assert json.loads(json.dumps(found.to_dict()))["footprint"]["total"] == found.footprint.total
    names = [name for name, _ in found.lines()]
    assert len(set(names)) == len(names)
    assert {"total parameters", "memory: total", "memory: available", "checkpoints", "step", "time"} <= set(names)


def test_a_step_that_does_not_fit_is_refused_before_anything_is_built(tiny_config, monkeypatch):
    monkeypatch.setattr("memlayers.lm.footprint.available_memory", lambda device: 1000)
    monkeypatch.setattr("memlayers.lm.dry_run.build_model", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match="a training step needs about .* and 1 kB are available on cpu"):
        dry_run(tiny_config, corpus=None, say=quiet)


def test_a_corpus_shorter_than_a_window_is_refused(tiny_config, tiny_corpus):
    tokens = tiny_corpus.train.num_tokens
    long = dataclasses.replace(
        tiny_config,
        model=dataclasses.replace(tiny_config.model, context=2 * tokens),
        training=dataclasses.replace(tiny_config.training, batch_tokens=2 * tokens),
    )
    with pytest.raises(ValueError, match=f"{tokens} tokens"):
        dry_run(long, corpus=tiny_corpus, say=quiet)
