import shutil

import pytest

from memlayers.files import read_sealed, write_sealed
from memlayers.lm.checkpoint import DESCRIPTION, Checkpoints


def fill(folder):
    (folder / "model.bin").write_bytes(bytes(range(100)))
    (folder / "code").mkdir()
    (folder / "code" / "state.json").write_text("{}")


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_comes_back_verified(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    assert checkpoints.newest_step() is None
    checkpoints.write(7, {"loss": 0.1}, fill)
    newest = checkpoints.newest()
    assert (newest.step, newest.content["loss"]) == (7, 0.1)
    assert files(newest.folder) == [DESCRIPTION, "code/state.json", "model.bin"]


def test_the_newest_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 100):
        checkpoints.write(step, {}, fill)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000010", "step-00000100"]
    assert checkpoints.newest().step == checkpoints.newest_step() == 100


def test_an_older_one_goes_only_when_the_new_one_is_verified(tmp_path, monkeypatch):
    import memlayers.lm.checkpoint as module

    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, {}, fill)

    def lose(path):
        if path.name == "model.bin":
            path.write_bytes(b"")

    monkeypatch.setattr(module, "_forget_cached", lose)
    with pytest.raises(ValueError, match="model.bin is damaged"):
        checkpoints.write(2, {}, fill)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.newest().step == 1


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, {}, fill)

    def fail(folder):
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(2, {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_a_killed_process_left_is_removed_and_said(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, {}, fill)
    fill_into = tmp_path / ".step-00000002.0a1b2c3d.partial"
    fill_into.mkdir()
    fill(fill_into)
    (tmp_path / ".step-00000000.removed").mkdir()
    assert checkpoints.remove_incomplete() == ["step-00000002"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", [DESCRIPTION, "model.bin", "code/state.json"])
def test_every_damage_is_named(tmp_path, name):
    checkpoints = Checkpoints(tmp_path)
    file = checkpoints.write(1, {"loss": 1.5}, fill) / name
    good = file.read_bytes()
    for place in range(len(good)):
        for damaged in (good[:place], good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                checkpoints.newest()
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} (is damaged: it is missing|cannot be read)"):
        checkpoints.newest()


def test_swapped_checkpoints_and_other_formats_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    one, two = (checkpoints.write(step, {}, fill) for step in (1, 2))
    shutil.rmtree(two)
    one.rename(two)
    with pytest.raises(ValueError, match="is damaged: it is of step 1, another checkpoint"):
        checkpoints.newest()


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    import memlayers.lm.checkpoint as module

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(module, "FORMAT", 1)
    checkpoints.write(1, {}, fill)
    monkeypatch.undo()
    message = (
        "is a checkpoint of format 1, this version reads format 2: resume the run with the version of memlayers that"
    )
    with pytest.raises(ValueError, match=message):
        checkpoints.newest()


def test_weights_that_somebody_put_beside_those_of_a_checkpoint_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.write(1, {}, fill)
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="'other.safetensors' was not written with the files in it"):
        checkpoints.newest()


@pytest.mark.parametrize("name", ["step", "files"])
def test_a_description_that_lacks_something_is_damaged(tmp_path, name):
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.write(1, {}, fill)
    content = read_sealed(folder / DESCRIPTION)
    del content[name]
    write_sealed(folder / DESCRIPTION, content)
    with pytest.raises(ValueError, match=f"checkpoint.json is damaged: it has no '{name}'"):
        checkpoints.newest()
