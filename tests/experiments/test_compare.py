import dataclasses
import json
import math

import pytest

import memlayers.experiments.compare as module
from memlayers.experiments.compare import compare, describe, loss_at_time, require_same_data
from memlayers.lm.data import Split
from memlayers.lm.footprint import footprint
from memlayers.lm.run import RunFolder
from memlayers.lm.train import train

NAMES = ["1-layers", "2-layers", "1-layers-memory"]


@pytest.fixture(scope="module")
def finished(comparison, corpus, tmp_path_factory):
    """A finished comparison: its folder and what it returned."""
    output = tmp_path_factory.mktemp("comparison") / "out"
    return output, compare(comparison, output, corpus=corpus, progress=False)


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that are trained."""
    names = []

    def record(config, output, **settings):
        names.append(output.name)
        return train(config, output, **settings)

    monkeypatch.setattr(module, "train", record)
    return names


def test_a_comparison_leaves_runs_and_a_report(finished, comparison):
    output, content = finished
    assert [path.name for path in sorted(output.iterdir())] == sorted([*NAMES, "results.json", "table.md", "loss.png"])
    assert json.loads((output / "results.json").read_text()) == content
    for name, config in comparison.runs().items():
        assert RunFolder(output / name).read_config() == config
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "table.md").read_text().startswith(content["headline"])


def test_figures_come_from_the_runs(finished):
    output, content = finished
    assert list(content["models"]) == NAMES
    assert content["baseline"] == "2-layers"
    results = {name: RunFolder(output / name).read_result() for name in NAMES}
    seconds = min(result["training"]["seconds"] for result in results.values())
    for name, model in content["models"].items():
        for field in ("parameters", "training", "curve", "validation"):
            assert model[field] == results[name][field]
        assert model["test"] is None
        assert model["equal_time"]["seconds"] == seconds
        if model["training"]["seconds"] == seconds:
            assert model["equal_time"]["perplexity"] == pytest.approx(model["validation"]["perplexity"])
        reading = model["speed"]["prefill_words_per_s"] / content["models"]["2-layers"]["speed"]["prefill_words_per_s"]
        assert model["prefill_ratio"] == pytest.approx(reading)
    assert content["models"]["2-layers"]["prefill_ratio"] == content["models"]["2-layers"]["decode_ratio"] == 1
    assert content["models"]["1-layers-memory"]["memory_layers"] == [1]
    (usage,) = content["models"]["1-layers-memory"]["validation"]["usage"].values()
    assert usage["tokens"] == content["models"]["1-layers-memory"]["validation"]["tokens"]


def test_finished_runs_are_used_again(finished, comparison, corpus, trained):
    output, content = finished
    before = {name: RunFolder(output / name).result.stat().st_mtime_ns for name in NAMES}
    again = compare(comparison, output, corpus=corpus, progress=False)
    assert trained == []
    assert {name: RunFolder(output / name).result.stat().st_mtime_ns for name in NAMES} == before
    for name in NAMES:
        assert again["models"][name]["validation"] == content["models"][name]["validation"]


def test_an_end_at_any_moment_loses_one_run(comparison, corpus, tmp_path, trained, monkeypatch):
    original = RunFolder.save_model

    def end(self, *args):
        if self.path.name == NAMES[1]:
            raise KeyboardInterrupt
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_model", end)
        with pytest.raises(KeyboardInterrupt):
            compare(comparison, tmp_path, corpus=corpus, progress=False)
    assert trained == NAMES[:2]
    trained.clear()
    compare(comparison, tmp_path, corpus=corpus, progress=False)
    assert trained == NAMES[1:]


def test_a_run_that_did_not_finish_goes_on_if_it_is_the_same_one(comparison, changed, corpus, tmp_path, monkeypatch):
    def begin(config, output, **settings):
        given.append((output.name, settings["resume"], settings["overwrite"]))
        raise KeyboardInterrupt

    given = []
    monkeypatch.setattr(module, "train", begin)
    folder = RunFolder(tmp_path / NAMES[0])
    run = comparison.runs()[NAMES[0]]
    rarely = dataclasses.replace(run, training=dataclasses.replace(run.training, keep_checkpoints=7))
    other = changed(weight_decay=0.1).runs()[NAMES[0]]
    for held, goes_on in ((None, False), (run, True), (rarely, True), (other, False)):
        if held is not None:
            folder.start(held, overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            compare(comparison, tmp_path, corpus=corpus, progress=False)
        assert given.pop() == (NAMES[0], goes_on, not goes_on)
    folder.config.write_text("{")
    with pytest.raises(ValueError, match="whose config.json is missing or not that of a run"):
        compare(comparison, tmp_path, corpus=corpus, progress=False)


@pytest.mark.promise(
    "Command line and files",
    "`memlayers compare` into a folder that has a `results.json` or `table.md` of somebody else",
    "refused",
    "before anything is trained; name another folder",
)
@pytest.mark.parametrize("name", ["results.json", "table.md", "loss.png"])
def test_a_report_takes_the_place_of_no_file_of_somebody_else(comparison, corpus, tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / name).write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match=f"or one without {name}, got .* not that of a comparison"):
        compare(comparison, tmp_path, corpus=corpus, progress=False)
    assert (tmp_path / name).read_text() == '{"accuracy": 1}'


def test_runs_of_another_configuration_are_not_used(finished, comparison, changed, corpus, trained):
    output, _ = finished
    message = r"1-layers' differs in \(there, asked for\): training.weight_decay: 0.0, 0.1"
    with pytest.raises(ValueError, match=message):
        compare(changed(weight_decay=0.1), output, corpus=corpus, progress=False)
    # A setting of the memory concerns the model that has one.
    other = dataclasses.replace(comparison, memory=dataclasses.replace(comparison.memory, topk=3))
    with pytest.raises(ValueError, match="1-layers-memory' differs in .*: memory.topk: 2, 3$"):
        compare(other, output, corpus=corpus, progress=False)
    assert trained == []


def test_runs_on_another_text_are_not_used(finished, comparison, corpus):
    output, _ = finished
    other = dataclasses.replace(corpus, manifest={**corpus.manifest, "corpus_sha256": "0"})
    with pytest.raises(ValueError, match="must not hold finished runs on other text"):
        compare(comparison, output, corpus=other, progress=False)


def test_the_test_split_is_read_only_on_demand(finished, comparison, corpus, monkeypatch):
    output, content = finished
    assert "test" not in (output / "table.md").read_text().lower().replace("latest", "")
    tested = compare(comparison, output, corpus=corpus, test_tokens=300, progress=False)
    expected = corpus.test.prefix(300)
    for name in NAMES:
        assert tested["models"][name]["test"]["tokens"] == expected.num_tokens - 1
        assert tested["models"][name]["test"]["words"] == expected.num_words
        assert tested["models"][name]["validation"] == content["models"][name]["validation"]
    assert "test perplexity" in (output / "table.md").read_text()
    compare(comparison, output, corpus=corpus, progress=False)  # as the other tests expect it


def test_what_cannot_be_compared_is_refused_before_any_work(comparison, corpus, tmp_path):
    with pytest.raises(ValueError, match="memory_layers must name at least one block"):
        compare(dataclasses.replace(comparison, memory_layers=()), tmp_path / "out", corpus=corpus)
    for tokens in (-1, 1):
        with pytest.raises(ValueError, match=f"test_tokens must be 0 or at least 2, got {tokens}"):
            compare(comparison, tmp_path / "out", corpus=corpus, test_tokens=tokens)
    for context in (1, 10_000):
        model = dataclasses.replace(comparison.model, context=context)
        training = dataclasses.replace(comparison.training, batch_tokens=context * 2)
        with pytest.raises(ValueError, match=f"model.context must be from 2 to the number .*, got {context}"):
            compare(dataclasses.replace(comparison, model=model, training=training), tmp_path / "out", corpus=corpus)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_later_is_refused_before_the_first_is_trained(
    comparison, corpus, tmp_path, trained, monkeypatch
):
    needs = [footprint(run, vocab_size=corpus.vocab_size).total for run in comparison.runs().values()]
    assert needs[0] < max(needs)
    with monkeypatch.context() as patch:
        patch.setattr("memlayers.lm.footprint.available_memory", lambda device: needs[0])
        with pytest.raises(ValueError, match="a training step needs"):
            compare(comparison, tmp_path / "out", corpus=corpus, progress=False)
    short = dataclasses.replace(corpus, train=Split(corpus.train.tokens[:16], corpus.train.documents[:1]))
    with pytest.raises(ValueError, match="model.context must be below the 16 tokens of the training text"):
        compare(comparison, tmp_path / "out", corpus=short, progress=False)
    untested = dataclasses.replace(corpus, test=Split(corpus.test.tokens[:1], corpus.test.documents[:1]))
    with pytest.raises(ValueError, match="test_tokens must be 0 for a corpus with 1 test tokens"):
        compare(comparison, tmp_path / "out", corpus=untested, test_tokens=300, progress=False)
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_finished_runs_need_no_memory_to_train(finished, comparison, corpus, trained, monkeypatch):
    output, _ = finished
    monkeypatch.setattr("memlayers.lm.footprint.available_memory", lambda device: 1)
    compare(comparison, output, corpus=corpus, progress=False)
    assert trained == []


def test_what_training_says_is_passed_on(comparison, corpus, tmp_path, monkeypatch, capsys):
    def end(self, *args):
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path / NAMES[0])
    folder.start(comparison.runs()[NAMES[0]])
    monkeypatch.setattr(RunFolder, "save_model", end)
    said = []
    with pytest.raises(KeyboardInterrupt):
        compare(comparison, tmp_path, corpus=corpus, progress=False, say=said.append)
    assert said[1:] == [f"{folder.path} has no checkpoint yet: the run begins again"]
    assert "has no checkpoint yet" not in capsys.readouterr().err


CURVE = [{"seconds": 10.0, "loss": 5.0}, {"seconds": 20.0, "loss": 4.0}, {"seconds": 40.0, "loss": 3.0}]


@pytest.mark.parametrize(
    ("seconds", "loss"),
    [(9.9, None), (10, 5.0), (12.5, 4.75), (20, 4.0), (25, 3.75), (40, 3.0), (100, 3.0)],
)
def test_equal_time_is_on_the_line_between_evaluations(seconds, loss):
    assert loss_at_time(CURVE, seconds) == loss
    assert loss_at_time([], seconds) is None


def test_equal_time_is_when_the_first_is_done(finished, comparison):
    output, _ = finished
    names = list(comparison.runs())
    results = {name: RunFolder(output / name).read_result() for name in names}
    for name, seconds in zip(names, (30.0, 60.0, 35.0), strict=True):
        results[name]["training"]["seconds"] = seconds
        step = seconds / len(results[name]["curve"])
        results[name]["curve"] = [{"seconds": step * number, "loss": 7.0 - number} for number in (1, 2, 3)]
    speeds = {name: _Speed() for name in names}
    models = module.summarise(results, comparison.runs(), speeds, {}, baseline="2-layers")
    losses = [models[name]["equal_time"]["loss"] for name in names]
    # 30 s are the end of the first, halfway between 20 and 40 s of the second, 30 / 35 of the last.
    assert losses == pytest.approx([4.0, 7 - 1.5, 7 - 3 * 30 / 35])
    assert models["2-layers"]["equal_time"]["perplexity"] == pytest.approx(math.exp(5.5))
    for result in results.values():  # of models that have diverged
        result["curve"] = [{**place, "loss": 1000.0} for place in result["curve"]]
    models = module.summarise(results, comparison.runs(), speeds, {}, baseline="2-layers")
    assert [models[name]["equal_time"]["perplexity"] for name in names] == [math.inf] * 3


class _Speed:
    prefill_words_per_s = decode_tokens_per_s = 1.0

    def to_dict(self):
        return {}


@pytest.mark.parametrize("field", ["corpus_sha256", "tokenizer_sha256", "order_sha256"])
def test_models_that_saw_other_tokens_are_not_compared(field):
    def result(**data):
        same = {"corpus_sha256": "a", "tokenizer_sha256": "b", "order_sha256": "c"}
        return {"data": {**same, **data}, "validation": {"tokens": 10}}

    require_same_data({"one": result(), "two": result()})
    with pytest.raises(ValueError, match=f"one and two differ in {field}"):
        require_same_data({"one": result(), "two": result(**{field: "other"})})


def test_models_that_were_evaluated_on_other_text_are_not_compared():
    data = {"corpus_sha256": "a", "tokenizer_sha256": "b", "order_sha256": "c"}
    results = {name: {"data": data, "validation": {"tokens": tokens}} for name, tokens in (("one", 10), ("two", 11))}
    with pytest.raises(ValueError, match="must be evaluated on the same text"):
        require_same_data(results)


def test_rows_are_called_by_what_they_are(comparison):
    labels = [describe(config) for config in comparison.runs().values()]
    assert labels == ["1 layer", "2 layers", "1 layer + memory"]
    twice = dataclasses.replace(comparison, model=dataclasses.replace(comparison.model, layers=3), memory_layers=(1, 3))
    assert describe(twice) == "3 layers + 2 memories"
