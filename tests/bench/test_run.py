import json
import re
import sys

import pytest
import torch

from memlayers import MemoryLayer
from memlayers.bench import cases, gate, limits, run, sweeps, timing
from memlayers.bench.machine import quiet_collector
from memlayers.bench.run import BenchConfig, case_names
from memlayers.bench.shapes import AXES, shape
from memlayers.cli import main


@pytest.fixture(autouse=True)
def _quick(without_numba, monkeypatch):
    monkeypatch.setattr(limits, "_STREAM_BYTES", 2**16)
    monkeypatch.setattr(timing, "_SETTLE_SECONDS", 0)
    monkeypatch.setitem(sys.modules, "product_key_memory", None)
    monkeypatch.setattr(cases, "cache_bytes", lambda _: 2**20)
    # The real one, in a process of its own, has a test of its own.
    monkeypatch.setattr(cases, "measure_peak", lambda name, *_: (1000, "") if name == "ours" else (2000, ""))


def bench(*arguments):
    return main(["bench", "--shapes", "tiny", "--repeats", "3", "--budget", "0.01", *map(str, arguments)])


def test_a_whole_run(tmp_path, capsys):
    assert bench("--output", tmp_path / "out", "--tokens", "40", "--threads", "1") == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "out"
    assert out.strip() == (folder / "table.md").read_text().strip()
    assert "memory: tiny" in err
    names = {"results.json", "table.md", *(f"{axis}.png" for axis in AXES)}
    assert {file.name for file in folder.iterdir()} == names
    content = json.loads((folder / "results.json").read_text())
    assert content["config"]["repeats"] == 3
    assert content["hardware"]["threads"] == 1
    assert "torch" in content["versions"]
    assert content["device"] == "cpu"
    assert "commit" in content
    assert content["command"]
    assert list(dict.fromkeys(result["case"] for result in content["results"])) == list(case_names())
    for result in content["results"]:
        found = result["contenders"]
        assert found, result["case"]
        for contender in found.values():
            count = {"memory": 1, "decode": 3}.get(result["case"], 3)
            assert len(contender["samples"]) == count
            assert contender["minimum"] <= contender["median"]
        if result["case"] not in ("machine", "tokens", "decode"):
            assert result["shape"]["tokens"] == 40
        if result["case"] != "machine":
            assert found["ours"]["ratio_to_ours"] == 1.0
            assert len(found) > 1


def results_of(case, **settings):
    config = BenchConfig(cases=(case,), shapes=("tiny",), repeats=3, budget=0.01, **settings)
    watch = run.Stopwatch(device=torch.device("cpu"), repeats=3, budget=0.01)
    ((entry, one),) = config.pairs()
    with quiet_collector():
        return list(run._results(entry, cases.Bench.on(watch, config.dtypes), one))


def test_dtypes_are_an_axis():
    both = ("float32", "bfloat16", "autocast")
    for case in ("forward", "decode", "train"):
        assert [result.part for result in results_of(case, dtypes=both)] == ["", "bfloat16", "autocast"]
        (result,) = results_of(case, dtypes=("autocast",))
        assert "textbook" in " ".join(result.samples)
        assert "ours" in result.samples
    assert [one.part for one in results_of("update", dtypes=("bfloat16",))] == [
        "bfloat16 table",
        "bfloat16 table and moments",
    ]
    assert [one.part for one in results_of("read", dtypes=("bfloat16",))] == ["bfloat16 table"]


def test_what_is_timed_in_bfloat16_is_in_bfloat16(monkeypatch):
    dtypes = []
    forward = MemoryLayer.forward

    def spy(self, x):
        dtypes.append((x.dtype, self.values.weight.dtype, torch.is_autocast_enabled("cpu")))
        return forward(self, x)

    monkeypatch.setattr(MemoryLayer, "forward", spy)
    for case in ("forward", "decode", "train"):
        results_of(case, dtypes=("bfloat16",))
        assert (torch.bfloat16, torch.bfloat16, False) in dtypes[-3:]
        results_of(case, dtypes=("autocast",))
        assert (torch.float32, torch.float32, True) in dtypes[-3:]


def test_outputs_in_16_bits_that_are_of_other_tokens_close_the_gate():
    outputs = torch.randn(40, 32)
    gate.check_16_bits(shape("tiny"), "output", outputs.bfloat16(), outputs)
    for wrong in (outputs.roll(1, 0), -outputs, outputs * torch.nan):
        with pytest.raises(gate.GateError, match="at tiny output: "):
            gate.check_16_bits(shape("tiny"), "output", wrong, outputs)


def test_tokens_are_an_axis():
    config = BenchConfig(cases=("read", "forward"), shapes=("tiny", "128x128"), tokens=(1, 16))
    found = [(case.name, one.name, one.tokens) for case, one in config.pairs()]
    assert found[:4] == [("read", "tiny", 1), ("read", "tiny", 16), ("read", "128x128", 1), ("read", "128x128", 16)]
    assert len(found) == 8
    assert BenchConfig(tokens=9).tokens == (9,)
    assert BenchConfig(tokens=None).tokens == ()


def test_contenders():
    (forward,) = results_of("forward")
    assert list(forward.samples)[:3] == ["ours", "textbook", "dense FFN (32, 128)"]
    parts = [name for name in forward.samples if name.endswith("(limit)")]
    assert parts[-1] == "query + keys + rows (limit)"
    for together, *each in zip(*(forward.samples[name] for name in (parts[-1], *parts[:-1])), strict=True):
        assert together == pytest.approx(sum(each))
    assert "product-key-memory: not installed" in forward.notes
    (train,) = results_of("train")
    trained = ["ours", "textbook, fused Adam", "textbook, SparseAdam", "ours on its references"]
    assert list(train.samples) == trained
    assert not [note for note in train.notes if note.startswith("ours on its references")]
    float32, few_bits, bfloat16 = results_of("read")
    assert list(few_bits.samples) == ["ours", "8 bits", "4 bits"]
    for result in (float32, bfloat16):
        assert list(result.samples) == ["ours", "F.embedding_bag", "copy (limit)", "random rows (limit)"]
    assert float32.work["ours"][0] == 2 * bfloat16.work["ours"][0] == 64 * 2 * 4 * 32 * 4
    for result in results_of("update"):
        assert list(result.samples) == ["ours", "copy (limit)"]
        assert result.limit == "copy (limit)"
    (decode,) = results_of("decode")
    assert decode.shape.tokens == 1
    assert "flat keys" in results_of("slots")[0].samples


def test_timings_of_evaluation_run_in_evaluation(monkeypatch):
    modes = []
    forward = MemoryLayer.forward

    def spy(self, x):
        modes.append((self.training, torch.is_grad_enabled()))
        return forward(self, x)

    monkeypatch.setattr(MemoryLayer, "forward", spy)
    results_of("forward")
    results_of("decode")
    assert set(modes) == {(False, False)}
    results_of("train")
    assert (True, True) in modes


def test_a_closed_gate_ends_it(tmp_path, monkeypatch, capsys):
    def closed(*_):
        raise gate.GateError("wrong result, so no speeds")

    timed = []
    monkeypatch.setattr(gate, "check_steps", closed)
    monkeypatch.setattr(run.Stopwatch, "rounds", lambda *_, **__: timed.append(1))
    assert bench("--output", tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("memlayers: error: wrong result, so no speeds\n")
    assert timed == []
    assert not (tmp_path / "out").exists()


def test_the_gate_is_asked_about_every_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(gate, "check", lambda one, _: asked.append(one))
    config = BenchConfig(cases=("select", "read"), shapes=("512x512", "1024x1024", "tiny"))
    run._open_gate(config, torch.device("cpu"), lambda _: None)
    assert {one.num_subkeys for one in asked} == {128, 512, 1024, 16}
    assert len(asked) == 4  # the wide one of 512x512 is that of 1024x1024


@pytest.mark.parametrize("case", ["forward", "read", "decode", "machine"])
def test_what_does_not_fit_is_skipped(case, monkeypatch):
    monkeypatch.setattr(cases, "available_memory", lambda _: 1000)
    (result,) = results_of(case)
    assert not result.samples
    assert result.notes == ("skipped: needs 0 GB, 0 GB are free",)


def test_a_contender_that_does_not_fit_is_left_out(monkeypatch):
    one = shape("tiny")
    monkeypatch.setattr(cases, "contender_bytes", lambda name, _: 10**9 if name == "ours" else 17 * 10**9)
    monkeypatch.setattr(cases, "available_memory", lambda _: 12 * 10**9)
    (result,) = results_of("train")
    assert list(result.samples) == ["ours"]
    assert result.notes[0] == "textbook, fused Adam: needs 17 GB, 12 GB are free"
    (result,) = results_of("memory")
    assert list(result.samples) == ["ours", "table and two moments (limit)"]
    assert result.samples["table and two moments (limit)"] == [3 * one.table_bytes]


def test_a_sweep_narrows_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(sweeps, "_NARROW", 8)
    largest = max(one.table_bytes for one in sweeps.sweep("slots", shape("tiny")))
    # Room for the largest table of width 8, but not of width 32.
    monkeypatch.setattr(sweeps, "contender_bytes", lambda _, one: one.table_bytes)
    monkeypatch.setattr(cases, "contender_bytes", lambda _, one: one.table_bytes)
    monkeypatch.setattr(type(shape("tiny")), "workspace_bytes", 0)
    monkeypatch.setattr(cases, "available_memory", lambda _: largest - 1)
    results = results_of("slots")
    widths = [result.shape.value_dim for result in results if result.part == "forward"]
    assert widths == [32, 32, 32, 32, 8]
    assert results[-1].shape.value_dim == 8
    assert results[-1].notes[0].startswith("values of width 8: width 32 needs")
    assert all(result.samples for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "nap"], "cases must be some of machine, .*, got 'nap'"),
        (["--shapes", "huge"], "shapes must be among .*, got 'huge'"),
        (["--repeats", "0"], "repeats must be an integer of at least 1, got 0"),
        (["--threads", "0"], "threads must be an integer of at least 1, got 0"),
        (["--budget", "0"], "budget must be a finite number above 0, got 0"),
        (["--dtypes", "float64"], "dtypes must be some of float32, bfloat16, autocast, got 'float64'"),
        (["--tokens", "0"], "tokens must be an integer of at least 1, got 0"),
        (["--tokens", "1"], "tokens must be at least 2 where BatchNorm is trained"),
        (["--device", "tpu"], "device must be one of auto, cpu.*, got 'tpu'"),
        (["--output", "taken"], "output must be a folder that does not exist yet, got 'taken'"),
        (["--output", "file/out"], "output must be in a folder that can be written to, got 'file/out'"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(gate, "check", lambda *_: 1 / 0)
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert {file.name for file in tmp_path.iterdir()} == {"taken", "file"}


def test_a_configuration_in_python():
    config = BenchConfig(cases=["select"], shapes=["tiny"])
    assert config.cases == ("select",)
    with pytest.raises(ValueError, match="cases must be some of"):
        BenchConfig(cases=())
    with pytest.raises(ValueError, match="repeats must be an integer"):
        BenchConfig(repeats=True)
    with pytest.raises(ValueError, match="budget must be a finite number above 0, got nan"):
        BenchConfig(budget=float("nan"))
    default = [(case.name, one.name) for case, one in BenchConfig().pairs()]
    assert ("memory", "2048x2048") in default
    assert [name for name, _ in default].count("train") == 2
    assert [name for name, _ in default].count("slots") == 1
