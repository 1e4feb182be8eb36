import contextlib
import json
import os

import pytest

from memlayers.lm import run as module
from memlayers.lm.config import RunConfig, TrainingConfig
from memlayers.lm.run import RunFolder, check_output


class Killed(BaseException):
    """What no code handles, as the end of a process."""


def config(seed):
    return RunConfig(training=TrainingConfig(seed=seed))


def finish(folder, seed=1, **settings):
    """A finished run with something in each of its parts."""
    folder.start(config(seed), **settings)
    folder.model.mkdir()
    (folder.model / "weights").write_text(f"weights of {seed}")
    folder.tensorboard.mkdir()
    folder.metrics.write_text(f'{{"step": {seed}}}\n')
    folder.finish({"config": config(seed).to_dict(), "data": {}})


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def kill(monkeypatch):
    """Have the process end before a move or a writing, counted from 0; None: never."""
    at = {"count": 0, "moment": None}
    original = os.replace

    def replace(*paths):
        if at["count"] == at["moment"]:
            raise Killed
        at["count"] += 1
        original(*paths)

    monkeypatch.setattr(os, "replace", replace)

    def at_moment(moment):
        at.update(count=0, moment=moment)

    return at_moment


@pytest.mark.parametrize("moment", range(7))  # five parts, the folder's name, the new configuration
@pytest.mark.parametrize("again", range(7))
def test_an_overwritten_run_survives_kills_at_any_moment(tmp_path, kill, moment, again):
    folder = RunFolder(tmp_path / "run")
    finish(folder)
    before = content(folder.path)
    for at in (moment, again):
        kill(at)
        with contextlib.suppress(Killed):  # the second may have too little left to do to be hit
            folder.start(config(2), overwrite=True)
    kill(None)
    folder.start(config(3), overwrite=True)
    assert content(folder.replaced) == before
    assert not folder.replacing.exists()
    assert folder.read_config() == config(3)
    assert not folder.finished


@pytest.mark.parametrize("moment", range(7))
def test_a_kill_never_leaves_less_than_the_finished_run(tmp_path, kill, moment):
    folder = RunFolder(tmp_path / "run")
    finish(folder)
    before = content(folder.path)
    kill(moment)
    with pytest.raises(Killed):
        folder.start(config(2), overwrite=True)
    places = (folder.path, folder.replacing, folder.replaced)
    together = {name: (place / name).read_bytes() for place in places for name in before if (place / name).is_file()}
    assert together == before
    assert folder.finished == (moment == 0)


def test_the_move_ends_with_any_start_and_what_was_replaced_goes_with_the_finish(tmp_path, kill):
    folder = RunFolder(tmp_path / "run")
    finish(folder)
    before = content(folder.path)
    kill(5)  # all parts are moved, the folder has not got its name
    with pytest.raises(Killed):
        folder.start(config(2), overwrite=True)
    kill(None)
    assert not folder.begun
    folder.start(config(2))
    assert content(folder.replaced) == before
    folder.model.mkdir()
    folder.finish({"config": config(2).to_dict(), "data": {}})
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json", "model", "result.json"]


def test_what_a_kill_after_the_result_left_is_tidied_up(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    finish(folder)
    folder.start(config(2), overwrite=True)
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    folder.tidy()  # a run that is not finished needs them
    assert folder.checkpoints.exists()
    assert folder.replaced.exists()
    folder.model.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "tidy", lambda self: None)
        folder.finish({"config": config(2).to_dict(), "data": {}})
    assert folder.replaced.exists()
    folder.tidy()
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json", "model", "result.json"]


@pytest.mark.promise(
    "Command line and files",
    "`--overwrite` or `--resume` on a folder with `checkpoints/` or `model/` that is no run of ours",
    "refused",
    "nothing is removed; name another folder, or move them away",
)
@pytest.mark.parametrize("settings", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("described", [None, "{", "[]", '{"model_type": "llama", "model": 1}', '{"model": {}}'])
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path, settings, described):
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "epoch-1").mkdir(parents=True)
    folder.model.mkdir()
    if described is not None:
        folder.config.write_text(described)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="must be the folder of a run or one without model, checkpoints"):
        folder.check(**settings)
    if "resume" not in settings:
        with pytest.raises(ValueError, match="move them away yourself"):
            folder.start(config(1), **settings)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_of_another_version_is_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text('{"model": {"depth": 1}, "training": {}}')
    folder.start(config(2), overwrite=True)
    assert folder.read_config() == config(2)


def test_what_a_link_points_to_is_not_removed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(config(1))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine").write_text("")
    folder.checkpoints.symlink_to(tmp_path / "disk")
    folder.start(config(2), overwrite=True)
    assert (tmp_path / "disk" / "mine").exists()
    assert not folder.checkpoints.exists()


def test_what_is_no_folder_cannot_be_the_output(tmp_path):
    file = tmp_path / "file"
    file.touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    long = tmp_path / "new" / ("a" * 300)
    for path, message in (
        (file, f"output must be a folder, got the file '{file}'"),
        (link, f"output must be a folder, got the file '{link}'"),
        (file / "run", f"output must be a folder that can be made, got '{file}/run': '{file}' is no folder"),
        (link / "run", f"output must be a folder that can be made, got '{link}/run': '{link}' is no folder"),
        (long, f"output must be a folder that can be made, got '{long}': File name too long"),
        (long.parent.parent / long.name, "output must be a folder that can be made, .*: File name too long"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_place_that_cannot_be_looked_at_or_written_to_cannot_be_the_output(tmp_path, monkeypatch):
    path = tmp_path / "new" / "run"
    asked = []

    def access(place, mode):
        asked.append((place, mode))
        return False

    monkeypatch.setattr(module.os, "access", access)
    with pytest.raises(ValueError, match=f"output must be a folder that can be made, .*: '{tmp_path}' cannot be writt"):
        check_output(path)
    with pytest.raises(ValueError, match=f"output must be a folder that can be written to, got '{tmp_path}'"):
        check_output(tmp_path)
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2

    def lstat(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "lstat", lstat)
    with pytest.raises(ValueError, match="output must be a folder that can be made, .*: Permission denied"):
        check_output(path)


def test_looking_at_the_output_makes_and_removes_nothing(tmp_path, monkeypatch):
    def change(self, *args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(type(tmp_path), "mkdir", change)
    monkeypatch.setattr(type(tmp_path), "rmdir", change)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "new" / "run", tmp_path, module.Path("run"), module.Path()):
        check_output(path)
    assert not list(tmp_path.iterdir())


def test_a_configuration_of_another_version_is_told_from_a_damaged_one(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start(config(1))
    folder.config.write_text(json.dumps({**config(1).to_dict(), "colour": "red"}))
    with pytest.raises(ValueError, match="config.json is of another version: unknown configuration field 'colour'"):
        folder.read_config()
    folder.config.write_text('{"model": ')
    with pytest.raises(ValueError, match="config.json is damaged: "):
        folder.read_config()
    folder.config.unlink()
    folder.start(config(1))
    folder.model.mkdir()
    folder.finish({"config": {"colour": "red"}, "data": {}})
    with pytest.raises(ValueError, match="result.json is of another version: unknown configuration field 'colour'"):
        folder.read_config()


def test_a_half_written_line_of_the_metrics_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n')
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3, is damaged: "):
        folder.read_metrics()
