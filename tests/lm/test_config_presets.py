import dataclasses
import shutil

import pytest

from memlayers.lm.build import build_model
from memlayers.lm.presets import preset, preset_names
from memlayers.lm.train import train
from memlayers.parameters import count_parameters


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_builds_and_counts_its_parameters_without_storage(name):
    config = preset(name).run()
    model = build_model(config, vocab_size=config.data.vocab_size, eot_id=0, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = count_parameters(model)
    weights = [one for name, one in model.named_parameters() if not name.endswith("row_mark")]
    assert counts["total"] == sum(one.numel() for one in weights)
    assert counts["values"] == len(config.memory_layers) * config.memory.slots * config.model.dim


def test_the_papers_models_have_the_papers_sizes():
    small, large = preset("paper-12x1024"), preset("paper-24x1024")
    for config, layers in ((small, 12), (large, 24)):
        assert (config.model.layers, config.model.dim, config.model.heads) == (layers, 1024, 16)
        assert config.data.vocab_size == 60_000
        assert (config.training.learning_rate, config.training.betas) == (2.5e-4, (0.9, 0.98))
        assert config.training.schedule == "inverse_sqrt"
    assert (small.memory.heads, small.memory.topk, small.memory.slots) == (4, 32, 512**2)
    assert small.training.value_learning_rate == 1e-3
    assert len(small.memory_layers) == 1
    assert large.memory_layers == ()
    counts = count_parameters(build_model(small.run(), vocab_size=60_000, eot_id=0, device="meta"))
    # 12 blocks of 12 D^2 and their biases and norms, one FFN of 8 D^2 + 5 D less; embeddings; the table.
    blocks = 12 * (12 * 1024**2 + 13 * 1024) - (8 * 1024**2 + 5 * 1024)
    assert counts["rest"] == blocks + 2 * 1024 + (60_000 + 512) * 1024
    assert counts["values"] == 262_144 * 1024


def test_a_comparison_is_three_runs_from_one_base():
    demo = preset("demo")
    config = dataclasses.replace(demo, base_learning_rate=3e-3, deep_learning_rate=5e-4)
    base, deep, memory = config.runs().values()
    assert memory == config.run()
    assert (base.model.layers, deep.model.layers, memory.model.layers) == (4, 8, 4)
    assert (base.memory_layers, deep.memory_layers, memory.memory_layers) == ((), (), (3,))
    rates = [run.training.learning_rate for run in (base, deep, memory)]
    assert rates == [3e-3, 5e-4, demo.training.learning_rate]
    for run in (base, deep):
        assert run.data == memory.data
        assert dataclasses.replace(run.training, learning_rate=demo.training.learning_rate) == memory.training
        assert dataclasses.replace(run.model, layers=4) == memory.model


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="memory_layers must name at least one block"):
        preset("paper-24x1024").runs()
    with pytest.raises(ValueError, match="^deep_learning_rate must be a finite number above 0 .*, got -1"):
        dataclasses.replace(preset("demo"), deep_learning_rate=-1.0)
    with pytest.raises(ValueError, match="preset must be one of 'demo', .* got 'nonsense'"):
        preset("nonsense")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper-12x1024", "paper-24x1024"])
def test_the_papers_models_train_a_step(name, tiny_corpus, tmp_path, monkeypatch):
    import memlayers.lm.train as module

    config = preset(name).run()
    built = module.build_model
    # The tiny text has a tiny vocabulary; the model keeps the paper's 60,000 tokens.
    monkeypatch.setattr(
        module, "build_model", lambda config, **kwargs: built(config, **{**kwargs, "vocab_size": 60_000})
    )
    training = dataclasses.replace(config.training, tokens=512, batch_tokens=512, eval_tokens=100)
    result = train(dataclasses.replace(config, training=training), tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert result["training"]["steps"] == 1
    assert 0 < result["validation"]["loss"] < 15
    shutil.rmtree(tmp_path / "run")  # gigabytes, which pytest would keep
