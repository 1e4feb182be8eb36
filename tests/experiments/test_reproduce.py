import dataclasses
import functools
import json
import math
import re

import pytest

import memlayers.experiments.reproduce as module
from memlayers.config import MemoryConfig
from memlayers.experiments import scales
from memlayers.experiments.depth import DEPTH, at_rate, best_rate
from memlayers.experiments.equivalent import PowerLaw
from memlayers.experiments.experiment import Claim
from memlayers.experiments.noise import NOISE
from memlayers.experiments.points import Point, is_below, point, pooled_noise, versus
from memlayers.experiments.records import GridFolder, Identity
from memlayers.experiments.registry import EXPERIMENTS
from memlayers.experiments.reproduce import plan, planned, reproduce
from memlayers.experiments.scales import changed, scale
from memlayers.experiments.speeds import in_turns
from memlayers.experiments.worker import work
from memlayers.experiments.write_up import _plot, places
from memlayers.lm.config import RunConfig
from memlayers.lm.faults import Diverged

IDENTITY = Identity("a", "b", "fp32")


@pytest.fixture
def tiny(comparison, monkeypatch):
    """A laptop scale of models that train in a moment."""
    fields = {
        **scales._laptop(),
        "base": changed(comparison.run(), {"memory_layers": (), "training.eval_tokens": 200}),
        "layer": 1,
        "several": (),
        "rates": (1e-3, 2e-3, 4e-3),
        "subkeys": (4, 6),
        "grid_tokens": 128,
        "final_tokens": 192,
        "seeds": 1,
        "noise_seeds": 2,
    }
    monkeypatch.setattr(scales, "_laptop", lambda: dict(fields))
    return scale("laptop", vocab_size=270)


@pytest.fixture
def trained(monkeypatch):
    """The keys of the runs that are trained, here and not in processes of their own."""
    keys = []

    def run(runs, folder, corpus, *, keep_models, **others):
        folder.runs.mkdir(exist_ok=True)
        for key, config in runs.items():
            if not folder.result(key).is_file():
                keys.append(key)
                place, result = str(folder.runs / key), str(folder.result(key))
                request = {"key": key, "config": config.to_dict(), "folder": place, "result": result}
                work({**request, "corpus": str(corpus.folder), "threads": 1, "keep_models": keep_models})

    monkeypatch.setattr(module, "run_grid", run)
    return keys


def record(perplexity=None, failed=None):
    usage = {"mlp": {"tokens": 9, "slots": 16, "overall": dict.fromkeys(("usage", "count_usage", "top1_usage"), 50.0)}}
    usage["mlp"]["overall"]["kl"] = 0.5
    return {
        "failed": failed,
        "validation": {"perplexity": perplexity, "usage": usage},
        "parameters": {"total": 100, "values": 10},
        "hardware": {"gpu": None, "cpu": "one", "threads": 1},
        "versions": {"torch": "2", "memlayers": "0"},
    }


def test_the_name_of_a_run_stays_what_it_was():
    # Finished runs lie under these names: a field that is new needs its neutral value in records.py.
    assert IDENTITY.key(RunConfig()) == "dfed97801cc24f5a"
    assert IDENTITY.key(changed(RunConfig(), {"memory_layers": (2, 3), "training.seed": 1})) == "5e97e3f81588f52f"


@pytest.mark.parametrize(
    "fields", [{"memory.topk": 4}, {"training.value_learning_rate": 1.0}, {"training.keep_checkpoints": 5}]
)
def test_what_has_no_effect_makes_no_other_run(fields):
    assert IDENTITY.key(changed(RunConfig(), fields)) == IDENTITY.key(RunConfig())


@pytest.mark.parametrize(
    "fields",
    [{"training.seed": 1}, {"model.layers": 5}, {"training.eval_tokens": 9}, {"memory_layers": (1,)}],
)
def test_what_has_an_effect_makes_another_run(fields):
    assert IDENTITY.key(changed(RunConfig(), fields)) != IDENTITY.key(RunConfig())
    assert IDENTITY._replace(precision="bf16").key(RunConfig()) != IDENTITY.key(RunConfig())


def test_an_experiment_leaves_records_and_a_report(tiny, trained, corpus, tmp_path):
    content = reproduce("noise", tmp_path, corpus=corpus)
    assert len(trained) == 4
    assert (content["runs"], content["finished"]) == (4, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.json", "noise", "results", "runs"]
    assert list((tmp_path / "runs").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "noise").iterdir()) == ["noise.png", "report.json", "report.md"]
    assert json.loads((tmp_path / "noise" / "report.json").read_text()) == content
    assert set(content["points"]) == {"1 layers", "1 layers + memory"}
    assert content["points"]["1 layers + memory"]["usage"] > 0
    # Nothing is trained twice, by whatever experiment.
    del trained[:]
    assert reproduce("noise", tmp_path, corpus=corpus) == content
    assert trained == []
    text = plan("noise", corpus=corpus, output=tmp_path)
    assert text.count("| done |") == 4
    assert "4 runs, 4 of them done; about 0 s" in text
    sorted((tmp_path / "results").iterdir())[0].unlink()
    assert "4 runs, 3 of them done; about" in plan("noise", corpus=corpus, output=tmp_path)
    assert "4 runs; about" in plan("noise", corpus=corpus, output=tmp_path / "other")


def test_experiments_share_the_runs_that_they_have_in_common():
    sizes = scale("laptop")
    noise, size = (
        {IDENTITY.key(run.config) for run in planned(EXPERIMENTS[name], sizes)} for name in ("noise", "size")
    )
    assert len(noise & size) == 4  # two seeds without a memory, two with the recipe of the base


def test_a_report_can_be_made_of_what_is_there(tiny, trained, corpus, tmp_path):
    content = reproduce("depth", tmp_path, corpus=corpus, report_only=True)
    assert trained == []
    assert content["finished"] == 0
    text = (tmp_path / "depth" / "report.md").read_text()
    assert "**0 of 12 runs are finished.**" in text
    assert "*open*" in text
    assert "| 24 | 16.0 |" in text


def test_a_run_that_diverges_is_a_result(tiny, trained, corpus, tmp_path, monkeypatch):
    def diverge(*args, **settings):
        raise Diverged("stopped at step 2 of 2: the loss is nan; the last good checkpoint is of step 1")

    monkeypatch.setattr("memlayers.experiments.worker.train", diverge)
    content = reproduce("noise", tmp_path, corpus=corpus)
    assert len(trained) == 4
    assert content["points"]["1 layers"]["failed"] == ["stopped at step 2 of 2: the loss is nan"]
    assert "| 1 layers | - | - | - | - | diverged |" in (tmp_path / "noise" / "report.md").read_text()
    reproduce("noise", tmp_path, corpus=corpus)
    assert len(trained) == 4


@pytest.mark.promise(
    "Command line and files",
    "`memlayers reproduce` into a folder with results on other text, or with files that are none of its own",
    "refused",
    "before anything is trained; name another folder",
)
def test_a_folder_of_something_else_is_refused(tiny, trained, corpus, tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(ValueError, match="or one without results, got .*, which has no grid.json"):
        reproduce("noise", tmp_path, corpus=corpus)
    GridFolder(tmp_path).start(Identity("other", corpus.tokenizer_sha256, "fp32"))
    with pytest.raises(ValueError, match="must not hold results of another corpus: .* has other, asked for is"):
        reproduce("noise", tmp_path, corpus=corpus)
    (tmp_path / "grid.json").write_text("[]")
    with pytest.raises(ValueError, match="grid.json' is not that of one"):
        reproduce("noise", tmp_path, corpus=corpus)
    assert trained == []


def test_text_is_not_seen_twice(tiny, trained, corpus, tmp_path, monkeypatch):
    fields = {**scales._laptop(), "grid_tokens": corpus.train.num_tokens + 1}
    monkeypatch.setattr(scales, "_laptop", lambda: dict(fields))
    with pytest.raises(ValueError, match="corpus must have at least the .* tokens that a run reads"):
        reproduce("noise", tmp_path / "out", corpus=corpus)
    with pytest.raises(ValueError, match="corpus must have at least the .* tokens that a run reads"):
        plan("noise", corpus=corpus)
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_a_plan_for_a_file_is_refused(tiny, corpus, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        plan("noise", corpus=corpus, output=tmp_path / "out")


def test_a_report_makes_no_text(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("the default text is made"))
    with pytest.raises(ValueError, match="corpus must be given to report on runs, since .*corpus' is none"):
        reproduce("noise", tmp_path / "out", report_only=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["", "garbage", "[1]"])
def test_damaged_speeds_are_named_and_measured_anew(damage, tiny, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("memlayers.experiments.speeds.REPEATS", 1)
    layer = MemoryConfig(dim=16, value_dim=8, heads=2, topk=2, num_subkeys=4, query_dim=8)
    small = dataclasses.replace(EXPERIMENTS["speed"], layers=lambda scale: {"one": layer}, speed_claims=lambda *_: [])
    monkeypatch.setitem(EXPERIMENTS, "speed", small)
    (tmp_path / "speeds").mkdir()
    for name in ("speed.json", "speed.begun.json"):
        (tmp_path / "speeds" / name).write_text(damage)
    with pytest.raises(ValueError, match="speed.json is damaged: remove it, and measure .* with --measure_speed"):
        reproduce("speed", tmp_path, corpus=corpus, report_only=True)
    assert "one" in reproduce("speed", tmp_path, corpus=corpus)["speeds"]["layers"]


def test_the_largest_budget_stops_where_the_text_does():
    assert scale("laptop").final_tokens == 20_000_000
    assert scale("laptop", train_tokens=11_999_999).final_tokens == 11_999_232


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "depht"}, "experiment must be one that is known, got 'depht'; did you mean 'depth'?"),
        ({"name": "noise", "scale": "huge"}, "scale must be one of 'laptop', 'gpu', 'paper', got 'huge'"),
        ({"name": "noise", "jobs": 0}, "jobs must be at least 1, got 0"),
    ],
)
def test_what_is_not_known_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        reproduce(output=tmp_path / "out", **settings)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("size", ["laptop", "gpu", "paper"])
def test_every_experiment_has_runs_at_every_scale(name, size):
    asked, sizes = EXPERIMENTS[name], scale(size)
    runs = planned(asked, sizes)
    assert runs or asked.layers(sizes)
    # The runs of a point differ in their seeds alone.
    points = {(run.point, changed(run.config, {"training.seed": 0})) for run in runs}
    assert len(points) == len({run.point for run in runs})
    # Nothing is known at first; claims are open then, and no sentence fails.
    names = dict.fromkeys(run.point for run in runs)
    claims = asked.claims(sizes, {name: point([None], None) for name in names})
    assert {claim.holds for claim in claims} <= {None}
    assert all(isinstance(claim, Claim) for claim in claims)


@pytest.mark.parametrize("size", ["laptop", "gpu", "paper"])
def test_the_recipe_of_the_paper_has_its_ratio_of_rates(size):
    sizes = scale(size)
    training = sizes.run(sizes.layer, fields=sizes.paper_recipe).training
    assert training.value_learning_rate == pytest.approx(4 * training.learning_rate)
    assert (training.value_schedule, training.selector_learning_rate) == ("constant", None)


def test_a_plan_counts_without_building(tiny):
    text = plan("noise")
    assert "| 1 layers + memory, seed 0 | " in text
    assert "4 runs; about" in text
    assert plan("speed") == "nothing is trained: 22 layers are measured"


def test_the_best_rate_is_known_when_all_were_tried(tiny):
    known = {}
    name = "1 layers"
    for rate, result in ((1e-3, record(5.0)), (2e-3, record(4.0)), (4e-3, record(failed="stopped"))):
        assert best_rate(tiny, known.get, name) is None
        known[at_rate(tiny, name, rate).config] = result
    assert best_rate(tiny, known.get, name) == 2e-3
    (table,) = DEPTH.tables(tiny, known.get)
    assert ["1 layers", "5.00", "4.00", "diverged", "0.002"] in table.rows
    # The runs that are reported have another seed than those that chose the rate.
    reported = [run.config.training for run in DEPTH.runs(tiny, known.get) if run.point.startswith("1 layers,")]
    assert {training.seed for training in reported if training.tokens == 192} == {1}


def test_the_plot_of_noise_shows_each_run_at_its_seed(tiny):
    known = {}
    runs = NOISE.runs(tiny, known.get)
    for number, run in enumerate(runs):
        known[run.config] = record(5.0 + number)
    points = {run.point: point([known[run.config]], None) for run in runs}
    shown = places(runs, points, known.get)
    heights = {name: {x: one.perplexity for x, one in line.items()} for name, line in shown.items()}
    assert heights == {"1 layers": {0: 5.0, 1: 6.0}, "1 layers + memory": {0: 7.0, 1: 8.0}}


def test_a_plot_shows_the_means_of_runs_that_stand_at_one_place(tiny):
    known = {}
    runs = [run for run in EXPERIMENTS["size"].runs(tiny, known.get) if run.series]
    points = {run.point: point([record(7.0)], None) for run in runs}
    shown = places(runs, points, known.get)  # no run is asked for
    assert {one.perplexity for line in shown.values() for one in line.values()} == {7.0}


def test_a_plot_has_a_panel_for_usage_where_there_are_memories_also_for_levels():
    dense = {"dense": {1e5: Point(runs=1, asked=1, perplexity=9.0), 2e5: Point(runs=1, asked=1, perplexity=8.0)}}
    memory = {"memory": {None: Point(runs=1, asked=1, perplexity=7.0, usage=40.0)}}
    (quality,) = _plot(EXPERIMENTS["equivalent"], dense).axes
    quality, used = _plot(EXPERIMENTS["equivalent"], dense | memory).axes
    assert [*used.lines[0].get_ydata()] == [40.0, 40.0]
    assert used.get_xlim() == quality.get_xlim()
    assert [tick.get_text() for tick in quality.get_xticklabels()] == ["100,000", "200,000"]


def test_a_point_is_the_mean_with_its_standard_error():
    one = point([record(9.0), record(11.0), None, record(failed="stopped")], noise=0.01)
    assert (one.runs, one.asked, one.failed) == (2, 4, ("stopped",))
    assert (one.perplexity, one.error) == (10.0, pytest.approx(1.0))
    assert (one.usage, one.kl, one.slots) == (50.0, 0.5, 16)
    assert point([record(10.0)], noise=0.02).error == pytest.approx(0.2)
    assert point([record(10.0)] * 4, noise=0.02).error == pytest.approx(0.1)  # that seeds agree may be chance
    assert point([record(10.0)], noise=None).error is None


def test_noise_is_pooled_over_groups():
    assert pooled_noise([[record(99.0), record(101.0)], [record(10.0)]]) == pytest.approx(0.02**0.5 / 10)
    assert pooled_noise([[record(10.0)], [None]]) is None


@pytest.mark.parametrize(("other", "expected"), [(12.1, None), (13.0, True), (7.0, False)])
def test_a_difference_counts_above_two_standard_errors(other, expected):
    one, two = (Point(runs=1, asked=1, perplexity=value, error=0.75) for value in (10.0, other))
    assert is_below(one, two) is expected
    assert is_below(one, dataclasses.replace(two, error=None)) is None
    assert is_below(None, two) is None


def test_differences_are_shown_with_their_error():
    one, two = (Point(runs=1, asked=1, perplexity=value, error=0.1) for value in (9.0, 10.0))
    assert versus(one, two) == "-10.0 % ± 1.4"
    assert versus(one, Point(runs=0, asked=1)) == "not known yet"


def test_a_power_law_is_found_and_inverted():
    law = PowerLaw.through([1e5, 2e5, 4e5, 8e5], [20 * size**-0.1 for size in (1e5, 2e5, 4e5, 8e5)], noise=0.0)
    assert (law.slope, math.exp(law.intercept)) == (pytest.approx(-0.1), pytest.approx(20))
    equal, factor = law.inverse(20 * 3e5**-0.1, error=0.01)
    assert equal == pytest.approx(3e5)
    # One per cent of perplexity is ten per cent of size where size counts to the power of -0.1.
    assert factor == pytest.approx(math.exp(0.1))
    scattered = PowerLaw.through([1e5, 2e5, 4e5, 8e5], [6.0, 5.7, 5.2, 5.1], noise=0.001)
    assert scattered.scatter > 0.005
    assert scattered.inverse(5.4, error=0.0)[1] > 1.03


def test_speeds_are_measured_and_reported(tiny, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("memlayers.experiments.speeds.REPEATS", 1)
    content = reproduce("depth", tmp_path, corpus=corpus, report_only=True, measure_speed=True)
    measured = content["speeds"]["models"]
    assert list(measured) == ["1 layers", "2 layers", "1 layers + 1 memory", "2 layers + 1 memory"]
    assert measured["1 layers"]["ratios"] == dict.fromkeys(measured["1 layers"]["ratios"], 1.0)
    memory = measured["1 layers + 1 memory"]
    for figure in ("prefill_words_per_s", "decode_tokens_per_s", "training_tokens_per_s"):
        assert memory["ratios"][figure] == pytest.approx(memory[figure] / measured["1 layers"][figure])
    assert content["speeds"]["hardware"]["threads"] >= 1
    # They stay for reports to come.
    assert reproduce("depth", tmp_path, corpus=corpus, report_only=True)["speeds"] == content["speeds"]
    assert "| 1 layers + 1 memory | " in (tmp_path / "depth" / "report.md").read_text().partition("Speeds, medians")[2]
    # Rates do not decide them, and speeds of models of other sizes are not shown for those of today.
    fields, said = scales._laptop(), []
    for changes, shown in (({"training.learning_rate": 1e-4}, content["speeds"]), ({"memory.topk": 1}, None)):
        base = changed(fields["base"], changes)
        monkeypatch.setattr(scales, "_laptop", functools.partial(dict, fields, base=base))
        report = reproduce("depth", tmp_path, corpus=corpus, report_only=True, say=said.append)
        assert report["speeds"] == shown
    assert said == ["depth: its speeds are those of other models and left out; measure them anew with --measure_speed"]


def test_speeds_of_an_experiment_without_any_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="measure_speed must be False for .* without speeds, got True for 'noise'"):
        reproduce("noise", tmp_path / "new", measure_speed=True)
    assert not (tmp_path / "new").exists()


def test_speeds_that_were_measured_before_an_end_are_not_measured_again(tiny, corpus, tmp_path, monkeypatch):
    layer = MemoryConfig(dim=16, value_dim=8, heads=2, topk=2, num_subkeys=4, query_dim=8)
    two = {"one": layer, "two": dataclasses.replace(layer, heads=1)}
    small = dataclasses.replace(EXPERIMENTS["speed"], layers=lambda scale: two, speed_claims=lambda *_: [])
    monkeypatch.setitem(EXPERIMENTS, "speed", small)
    asked = []

    def seconds(work):
        asked.append(work)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return dict.fromkeys(work, float(len(asked)))

    monkeypatch.setattr("memlayers.experiments.speeds.in_turns", seconds)
    with pytest.raises(KeyboardInterrupt):
        reproduce("speed", tmp_path, corpus=corpus)
    layers = reproduce("speed", tmp_path, corpus=corpus)["speeds"]["layers"]
    assert {name: one["memory"] for name, one in layers.items()} == {"one": 1.0, "two": 3.0}
    assert [path.name for path in (tmp_path / "speeds").iterdir()] == ["speed.json"]
    # What another machine has measured is no part of a table, nor are layers of that name that were other ones.
    for change in (
        lambda: monkeypatch.setattr("memlayers.experiments.reproduce.hardware", lambda: {"cpu": "another"}),
        lambda: two.update(one=dataclasses.replace(layer, topk=1)),
    ):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            reproduce("speed", tmp_path, corpus=corpus)
        change()
        layers = reproduce("speed", tmp_path, corpus=corpus)["speeds"]["layers"]
        assert {name: one["memory"] for name, one in layers.items()} == {"one": 3.0, "two": 4.0}


def test_what_takes_long_is_measured_in_fewer_rounds(monkeypatch):
    calls: list[str] = []
    work = {name: functools.partial(calls.append, name) for name in ("memory", "ffn")}
    assert in_turns(work).keys() == work.keys()
    assert len(calls) == 12  # five rounds, and the one that is not counted
    calls.clear()
    monkeypatch.setattr("memlayers.experiments.speeds.PATIENCE_S", 0.0)
    in_turns(work)
    assert calls == ["memory", "ffn"] * 2


def test_an_experiment_without_runs_measures_layers(tiny, corpus, tmp_path, monkeypatch):
    layer = MemoryConfig(dim=16, value_dim=8, heads=2, topk=2, num_subkeys=4, query_dim=8)
    small = dataclasses.replace(EXPERIMENTS["speed"], layers=lambda scale: {"one": layer}, speed_claims=lambda *_: [])
    monkeypatch.setitem(EXPERIMENTS, "speed", small)
    one = reproduce("speed", tmp_path, corpus=corpus)["speeds"]["layers"]["one"]
    assert one["ratio"] == pytest.approx(one["memory"] / one["ffn"])
    assert one["slots"] == 16
    assert [path.name for path in (tmp_path / "speed").iterdir()] == ["report.json", "report.md"]


def test_equal_time_is_reckoned_from_the_curve_and_the_speed(tiny):
    def known(config):
        memory, deep = bool(config.memory_layers), config.model.layers == 2
        end = 4.0 if memory else 3.0 if deep else 5.0
        place = {"tokens": config.training.tokens, "loss": end}
        found = record(math.exp(end))
        return {**found, "curve": [{"tokens": config.training.tokens / 2, "loss": 6.0}, place]}

    figures = {"ratios": {"prefill_words_per_s": 0.95, "training_tokens_per_s": 0.85}, "training_tokens_per_s": 100.0}
    names = ("1 layers", "1 layers + 1 memory", "2 layers + 1 memory")
    measured = {**dict.fromkeys(names, figures), "2 layers": {**figures, "training_tokens_per_s": 75.0}}
    read, train, *equal = DEPTH.speed_claims(tiny, known, {"models": measured})
    assert (read.holds, train.holds) == (True, False)
    # When the memory is done, at 4.0, the deeper model is at three quarters of its tokens, half-way from 6.0 to 3.0.
    assert all("perplexity 54.60 against 90.02" in claim.sentence for claim in equal)
    assert [claim.holds for claim in equal] == [True, True]


def test_the_best_rate_of_the_values_is_claimed_when_all_rates_ended():
    sizes = scale("laptop")
    low, middle, high = sizes.value_rates
    asked = EXPERIMENTS["updates"]
    results = dict.fromkeys(run.point for run in planned(asked, sizes))

    def judged():
        return [
            claim.holds for claim in asked.claims(sizes, {name: point([one], 0.01) for name, one in results.items()})
        ]

    results |= {f"{rule}, values at {middle:g}": record(4.0) for rule in ("row Adam", "dense Adam", "SparseAdam")}
    assert judged() == [None, None, None]
    results |= {f"row Adam, values at {low:g}": record(5.0), f"row Adam, values at {high:g}": record(failed="stopped")}
    assert judged() == [None, None, True]
    results |= {f"dense Adam, values at {rate:g}": record(3.0) for rate in (low, high)}
    results |= {f"SparseAdam, values at {rate:g}": record(5.0) for rate in (low, high)}
    assert judged() == [False, True, True]
    results[f"row Adam, values at {low:g}"] = record(2.0)
    assert judged() == [True, True, False]


@pytest.mark.parametrize("scale_name", ["laptop", "gpu", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_point_of_a_plot_hides_another(name, scale_name):
    """As one of a larger budget would."""
    done = {"failed": None, "validation": {"perplexity": 2.0, "usage": {}}}
    there = {}
    for run in EXPERIMENTS[name].runs(scale(scale_name), lambda config: done):
        if run.series:
            there.setdefault((run.series, run.x), set()).add((run.point, run.config.training.tokens))
    assert [points for points in there.values() if len(points) > 1] == []
    assert there or name == "speed"


@pytest.mark.slow
def test_depth_goes_from_rates_to_seeds_to_the_large_budget(tiny, trained, corpus, tmp_path):
    content = reproduce("depth", tmp_path, corpus=corpus)
    assert (content["runs"], content["finished"]) == (4 * (3 + 1 + 1), 20)
    assert len(trained) == 20
    report = (tmp_path / "depth" / "report.md").read_text()
    assert "(at the edge)" in report or "| best |" in report
    assert {one["perplexity"] is None for one in content["points"].values()} == {False}
    assert "1 layers + 1 memory, 0 M tokens" in content["points"]
