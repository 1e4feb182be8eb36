"""Runs whose tables of values are trained in files."""

import dataclasses
import gc

import pytest
import torch
from safetensors.torch import save_file

from memlayers.lm.dry_run import dry_run
from memlayers.lm.footprint import footprint, require_memory
from memlayers.lm.opened import open_saved
from memlayers.lm.run import RunFolder
from memlayers.lm.tables import lines
from memlayers.lm.train import Loop, train

TIMES = {"seconds", "tokens_per_s", "words_per_s"}


def of(config, folder, **training):
    """The run of a tiny model whose values are zeros at first, with its table in a folder or, None, in memory."""
    return dataclasses.replace(
        config,
        memory=dataclasses.replace(config.memory, value_std=0.0),
        memory_values="memory" if folder is None else f"mapped:{folder}",
        training=dataclasses.replace(
            config.training, tokens=64 * 12, eval_every_tokens=64 * 8, save_every_tokens=64 * 5, **training
        ),
    )


def metrics(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(folder).read_metrics()]


@pytest.fixture
def stop_after(monkeypatch):
    """Ends a training after so many steps."""
    original, at = Loop.forward_backward, {}

    def forward_backward(self, batches):
        if self.step == at.get("step"):
            raise KeyboardInterrupt
        return original(self, batches)

    monkeypatch.setattr(Loop, "forward_backward", forward_backward)
    return lambda step: at.update(step=step)


@pytest.mark.promise(
    "Command line and files",
    "`memlayers train --memory_values mapped:FOLDER`",
    "supported",
    "the table is trained in files; `--resume` goes on bit for bit",
)
def test_a_run_in_files_that_was_stopped_is_bit_for_bit_one_in_memory(tiny_config, tiny_corpus, tmp_path, stop_after):
    whole = train(of(tiny_config, None), tmp_path / "whole", corpus=tiny_corpus, progress=False)
    config = of(tiny_config, tmp_path / "tables")
    for step in (3, 7, 11, None):  # before the first checkpoint, after one, after two
        stop_after(step)
        if step is None:
            result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True)
        else:
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True)
        gc.collect()  # a traceback holds the model, and that the table
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert result["validation"] == whole["validation"]
    ours, theirs = (RunFolder(tmp_path / name).load_model().state_dict() for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (table,) = (tmp_path / "tables").iterdir()
    assert table.name == "transformer.h.1.mlp"


def test_the_checkpoint_before_one_that_was_not_finished_is_gone_on_from(
    tiny_config, tiny_corpus, tmp_path, stop_after, monkeypatch
):
    config = of(tiny_config, tmp_path / "tables", keep_checkpoints=1)
    expected = train(of(tiny_config, None), tmp_path / "whole", corpus=tiny_corpus, progress=False)
    with monkeypatch.context() as patch:  # the second checkpoint breaks off after that of the table
        patch.setattr("memlayers.lm.checkpoint.save_file", _fail_at(2))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    gc.collect()
    with pytest.raises(ValueError, match=r"checkpoint must hold its tables, .* let the run end \(--resume\)"):
        open_saved(tmp_path / "run" / "checkpoints" / "step-00000005")
    said = []
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True, say=said.append)
    assert said == ["going on from the checkpoint of step 5"]
    assert result["validation"] == expected["validation"]


def test_a_run_that_ends_before_its_result_is_written_goes_on(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    config = of(tiny_config, tmp_path / "tables")
    expected = train(of(tiny_config, None), tmp_path / "whole", corpus=tiny_corpus, progress=False)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    gc.collect()
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True)
    assert result["validation"] == expected["validation"]


def _fail_at(number):
    calls = []

    def save(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        save_file(*args)

    return save


def test_a_run_that_begins_wants_new_tables(tiny_config, tiny_corpus, tmp_path):
    config = of(tiny_config, tmp_path / "tables")
    train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    gc.collect()
    with pytest.raises(ValueError, match=r"memory_values must name a folder without tables for a run that begins"):
        train(config, tmp_path / "other", corpus=tiny_corpus, progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_values": "mapped:"}, "memory_values must be 'memory', 'host' or 'mapped:FOLDER', got 'mapped:'"),
        ({"memory_values": "disk"}, "memory_values must be 'memory', 'host' or 'mapped:FOLDER', got 'disk'"),
        ({"memory_kind": "experts", "memory_values": "mapped:x"}, "memory_values must be 'memory' with memory_kind"),
    ],
)
def test_what_tables_in_files_cannot_be_is_refused(tiny_config, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(tiny_config, **changes)


def test_the_footprint_has_tables_in_files_on_the_disk(tiny_config):
    need = [footprint(of(tiny_config, folder), vocab_size=300) for folder in (None, "tables")]
    rows = 16 * 16 * 4  # slots, width, bytes
    assert need[1].in_files == 3 * rows + 16 * 4  # weight, two moments, counts
    assert need[0].parameters - need[1].parameters == rows
    assert need[0].optimizer_state - need[1].optimizer_state == 2 * rows + 16 * 4
    assert need[0].total - need[1].total == need[1].in_files
    assert "in_files" not in need[0].to_dict()
    said = dict(lines(of(tiny_config, "tables"), need[1]))
    assert said["a step"] == "reads and writes at most 16 rows a table, 3 kB"
    assert "in tables, once" in said["tables in files"]
    assert lines(of(tiny_config, None), need[0]) == []


def test_a_dry_run_makes_no_tables(tiny_config, tmp_path):
    config = of(tiny_config, tmp_path / "tables")
    said = dry_run(config, corpus=None, say=lambda text: None).lines()
    assert "tables in files" in dict(said)
    assert not list(tmp_path.iterdir())


def test_the_footprint_has_tables_on_the_host_of_a_gpu_there(tiny_config):
    there = dataclasses.replace(of(tiny_config, None), memory_values="host")
    plain, need = (footprint(config, vocab_size=300, device="cuda") for config in (of(tiny_config, None), there))
    rows, moments = 16 * 16 * 4, 2 * 16 * 16 * 4 + 16 * 4  # slots, width, bytes; two moments, counts
    recorded = 16 * (8 + 4) + rows  # more tokens than rows: one gradient of all rows
    assert need.on_host == rows + moments + recorded
    assert plain.parameters - need.parameters == rows
    assert plain.optimizer_state - need.optimizer_state == moments
    assert plain.gradients - need.gradients == recorded
    assert need.activations - plain.activations == rows + 64 * 4 * 8  # all rows, and where in them
    assert need.saved == plain.saved + recorded
    assert need.to_dict()["on_host"] == need.on_host
    said = dict(lines(there, need))
    assert said["a step"] == "reads and writes at most 16 rows a table, 3 kB, on the host"
    assert said["copied a step"] == "at most 1 kB to the GPU and 7 kB back"
    on_cpu = footprint(there, vocab_size=300)
    assert on_cpu == footprint(of(tiny_config, None), vocab_size=300)
    assert dict(lines(there, on_cpu))["tables on the host"].endswith("nothing is copied")


def test_tables_on_the_host_that_do_not_fit_there_are_refused(tiny_config, monkeypatch):
    config = dataclasses.replace(of(tiny_config, None), memory_values="host")
    monkeypatch.setattr("memlayers.lm.footprint.available_memory", lambda device: 2000 if device == "cpu" else 10**9)
    with pytest.raises(ValueError, match="tables on the host need about 4 kB there and 2 kB are available"):
        require_memory(config, vocab_size=300, device="cuda")


@pytest.mark.promise(
    "Command line and files",
    "`memlayers train --memory_values host`",
    "supported",
    "on a GPU the table is trained on the host; `--resume` goes on",
)
def test_a_run_with_its_table_on_the_host_is_bit_for_bit_one_in_memory(
    tiny_config, tiny_corpus, tmp_path, stop_after, monkeypatch
):
    monkeypatch.setattr("memlayers.storage.host.is_beside", lambda weight_SV, slots_TM: False)
    plain = of(tiny_config, None)
    config = dataclasses.replace(plain, memory_values="host")
    whole = train(plain, tmp_path / "whole", corpus=tiny_corpus, progress=False)
    stop_after(7)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    stop_after(None)
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert result["validation"] == whole["validation"]


def test_a_run_in_files_begins_with_another_one(tiny_config, tiny_corpus, tiny_run, tmp_path, stop_after):
    config = of(tiny_config, tmp_path / "tables", begin_with=str(tiny_run))
    config = dataclasses.replace(config, memory=tiny_config.memory)
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):  # before the first checkpoint: it begins again
        train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    stop_after(None)
    result = train(config, tmp_path / "run", corpus=tiny_corpus, progress=False, resume=True)
    in_memory = dataclasses.replace(config, memory_values="memory")
    expected = train(in_memory, tmp_path / "whole", corpus=tiny_corpus, progress=False)
    assert [point["loss"] for point in result["curve"]] == [point["loss"] for point in expected["curve"]]
