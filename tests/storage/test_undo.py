"""Whatever ends a training of a table in files, its last checkpoint comes back: kills, power losses, a full disk."""

import errno
import os
import random
import sys

import numpy as np
import pytest
import torch

import kill_tables
from memlayers.optim import MemoryAdamW
from memlayers.storage.undo import UndoLog, read_log
from power_loss import Disk

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="follows descriptors by /proc")


@LINUX
@pytest.mark.promise(
    "Tables in files",
    "A kill, a power loss or a full disk while one is trained",
    "supported",
    "the last `table.checkpoint()` comes back when it is opened, bit for bit",
)
def test_the_last_checkpoint_survives_power_losses(tmp_path):
    cuts = kill_tables.Cuts(tmp_path, seed=5, share=0.1)
    cuts.run(40)
    assert cuts.wrong == 0
    assert cuts.lives > 1


@LINUX
@pytest.mark.slow
def test_a_process_that_is_killed_leaves_the_last_checkpoint(tmp_path):
    found = kill_tables.kill(6, 0, tmp_path)
    assert found["wrong"] == 0
    assert found["with_logs"] > 0


@LINUX
def test_a_log_that_is_not_flushed_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(UndoLog, "flush", lambda log: None)
    cuts = kill_tables.Cuts(tmp_path, seed=5, share=0.1)
    cuts.run(40)
    assert cuts.wrong > 0


def test_a_full_disk_is_an_error_before_anything_has_changed(tmp_path, monkeypatch):
    layer, table, optimizer = kill_tables.build(tmp_path)
    kill_tables.step(layer, optimizer, 0)
    table.checkpoint()
    at_checkpoint = kill_tables.digest(table)
    kill_tables.step(layer, optimizer, 1)
    before, failing = kill_tables.digest(table), []

    def full(original, allowed):
        def write(*args):
            failing.append(args[0])
            if len(failing) > allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args)

        return write

    for number in range(6):  # of writes that still succeed
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full(os.write, number))
            with pytest.raises(OSError, match=r"No space left on device: .*undo-"):
                kill_tables.step(layer, optimizer, 2)
        assert kill_tables.digest(table) == before
        failing.clear()
    kill_tables.step(layer, optimizer, 2)
    assert kill_tables.digest(table) != before
    table.restore()
    assert kill_tables.digest(table) == at_checkpoint


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    layer, table, optimizer = kill_tables.build(tmp_path)
    kill_tables.step(layer, optimizer, 0)
    table.checkpoint()
    expected = kill_tables.digest(table)
    kill_tables.step(layer, optimizer, 1)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            table.checkpoint()
    assert table.checkpoints == [1]
    assert table.unchanged_since == -1
    kill_tables.step(layer, optimizer, 2)
    table.close()
    _, again, _ = kill_tables.build(tmp_path)
    assert kill_tables.digest(again) == expected


def test_a_log_whose_making_was_interrupted_stops_no_later_step(tmp_path, monkeypatch):
    layer, table, optimizer = kill_tables.build(tmp_path)
    opened = os.open

    def interrupted(path, *how):
        descriptor = opened(path, *how)
        if os.path.basename(path).startswith("undo-"):
            os.close(descriptor)
            raise KeyboardInterrupt
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kill_tables.step(layer, optimizer, 0)
    before = kill_tables.digest(table)
    kill_tables.step(layer, optimizer, 0)
    assert kill_tables.digest(table) != before
    table.restore()
    assert kill_tables.digest(table) == before


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_checkpoint_leaves_the_last_one_or_the_new_one(tmp_path, monkeypatch, when):
    """Also to who goes on: what changes afterwards is put back to whichever of the two the folder names."""
    layer, table, optimizer = kill_tables.build(tmp_path)
    kill_tables.step(layer, optimizer, 0)
    table.checkpoint()
    last = kill_tables.digest(table)
    for number in (1, 2):
        kill_tables.step(layer, optimizer, number)
    new, replace = kill_tables.digest(table), os.replace

    def interrupted(source, target):
        is_description = os.path.basename(target) == "table.json"
        if not is_description or when == "after":
            replace(source, target)
        if is_description:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.checkpoint()
    assert table.checkpoints == ([1] if when == "before" else [2])
    for number in (2, 3):  # rows of the log that was open, and others
        kill_tables.step(layer, optimizer, number)
    table.close()
    _, again, _ = kill_tables.build(tmp_path)
    assert kill_tables.digest(again) == (last if when == "before" else new)


def test_the_dense_parameters_do_not_step_without_the_table(tmp_path, monkeypatch):
    layer, _, rows = kill_tables.build(tmp_path)
    rows.release()
    optimizer = MemoryAdamW(layer)
    keys = layer.keys.weight.clone()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(UndoLog, "flush", fail)
    with pytest.raises(OSError, match="No space"):
        kill_tables.step(layer, optimizer, 0)
    assert torch.equal(layer.keys.weight, keys)
    monkeypatch.undo()
    kill_tables.step(layer, optimizer, 0)
    assert not torch.equal(layer.keys.weight, keys)


def test_a_record_that_is_torn_is_none(tmp_path):
    log = UndoLog(tmp_path / "undo-00000001.log", {"weight": 8, "steps": 4})
    rows = {"weight": np.arange(16, dtype=np.uint8).reshape(2, 8), "steps": np.ones((2, 4), np.uint8)}
    log.add_old(np.array([3, 9]), rows)
    end = log.nbytes
    log.add_fresh(np.array([1, 2, 7]))
    log.flush()
    log.close()
    content = log.file.read_bytes()
    records = list(read_log(log.file))
    assert [record.slots.tolist() for record in records] == [[3, 9], [1, 2, 7]]
    assert {name: found.tolist() for name, found in records[0].rows.items()} == {n: r.tolist() for n, r in rows.items()}
    assert records[1].rows == {}
    for place in range(end, len(content)):  # a bit of the last record, and its end
        log.file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert [record.slots.tolist() for record in read_log(log.file)] == [[3, 9]]
        log.file.write_bytes(content[:place])
        assert [record.slots.tolist() for record in read_log(log.file)] == [[3, 9]]


@LINUX
def test_what_was_flushed_is_in_every_image_of_a_disk(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    disk, draw = Disk(folder), random.Random(0)
    with disk.recording():
        descriptor = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
        os.write(descriptor, b"a" * 5000)
        os.fsync(descriptor)
        os.pwrite(descriptor, b"b" * 5000, 0)
        os.close(descriptor)
    found = set()
    for number in range(60):
        disk.image(tmp_path / f"image-{number}", draw)
        content = (tmp_path / f"image-{number}" / "file").read_bytes()
        assert len(content) == 5000
        assert set(content) <= set(b"ab")
        found.add((content[:1], content[4095:4096], content[4999:]))
    assert {(b"a", b"a", b"b"), (b"b", b"b", b"a"), (b"b", b"a", b"a")} <= found
