"""Rows in a file: what makes room for them on the disk, with the calls that the system has and without them."""

import errno
import mmap
import os

import numpy as np
import pytest
import torch

from memlayers.storage import advice, rows
from memlayers.storage.rows import Ahead, MappedRows

PAGE = mmap.PAGESIZE


@pytest.fixture(params=["lists", "one by one", "writes"])
def way(request, monkeypatch):
    """How the system is told of pages: as it can, without lists of them, and without the call that makes them ready."""
    if request.param == "one by one":
        monkeypatch.setattr(advice, "_itself", lambda process: None)
    if request.param == "writes":
        monkeypatch.setattr(rows, "POPULATE_WRITE", 12_345)
    return request.param


def opened(path, slots, width=PAGE // 4):
    return MappedRows(path, (slots, width), torch.float32, writable=True)


def room(file):
    """Bytes that the disk has for a file."""
    os.fdatasync(file.descriptor)  # of `os.fsync` conftest.py makes nothing
    return os.fstat(file.descriptor).st_blocks * 512


def test_rows_get_room_alone_and_keep_what_they_are(tmp_path, way):
    file, slots = opened(tmp_path / "rows", 6000), np.arange(0, 6000, 2)
    file.write(np.array([4]), np.full((1, PAGE), 7, np.uint8))
    file.make_room(slots[slots != 4])  # more than a list has
    assert 3000 * PAGE <= room(file) <= 3000 * PAGE + 2**18
    file.put(slots[-2:], np.full((2, PAGE), 9, np.uint8))
    content = np.frombuffer((tmp_path / "rows").read_bytes(), np.uint8).reshape(6000, PAGE)
    assert np.flatnonzero(content.any(1)).tolist() == [4, 5996, 5998]
    assert content[[4, 5996, 5998]].min(1).tolist() == [7, 9, 9]


@pytest.mark.parametrize("width", [3, PAGE // 4 + 1, 3 * PAGE // 4])
def test_rows_that_end_within_pages_get_room_for_all_they_have(tmp_path, way, width):
    file = opened(tmp_path / "rows", 50, width)
    file.make_room(np.array([1, 2, 30]))
    before = room(file)
    file.put(np.array([1, 2, 30]), np.full((3, 4 * width), 5, np.uint8))
    file.flush()
    assert room(file) == before > 0


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, way):
    file = opened(tmp_path / "rows", 10)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        if way != "writes":
            error = OSError(errno.EFAULT, "Bad address")
            patch.setattr(rows, "advise", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match=r"No space left on device: '.*rows'"):
            file.make_room(np.array([3]))
        with pytest.raises(OSError, match=r"No space left on device: '.*rows'"):
            file.put(np.array([3]), np.ones((1, PAGE), np.uint8))
    assert not file.tensor.any()
    file.make_room(np.array([3]))


@pytest.mark.parametrize("bad", [0, 1, 1100, 1999])
def test_a_stretch_that_cannot_be_had_is_an_error_wherever_it_stands_in_a_list(tmp_path, bad):
    file, slots = opened(tmp_path / "rows", 4000), np.arange(0, 4000, 2)
    try:
        advice.advise(file.map, file._address, file.runs(slots), advice.POPULATE_WRITE)
    except OSError:
        pytest.skip("the system does not make pages ready")
    runs = file.runs(slots)
    runs[bad] += 2**45  # nobody's
    with pytest.raises(OSError, match=r"Cannot allocate|Invalid|Bad address"):
        advice.advise(file.map, file._address, runs, advice.POPULATE_WRITE)


def test_all_of_a_long_stretch_is_asked_for(tmp_path, monkeypatch):
    file, asked = opened(tmp_path / "rows", 200), []
    monkeypatch.setattr(rows, "advise", lambda pages, address, runs, advice: asked.append(runs.tolist()))
    file.ask(file.runs(np.array([0, 2, *range(10, 90)])))
    whole = 32 * PAGE if PAGE == 4096 else 2**17
    middle = list(range(10 * PAGE, 90 * PAGE, whole))
    ends = [*middle[1:], 90 * PAGE]
    assert asked == [[[0, PAGE], [2 * PAGE, 3 * PAGE], *map(list, zip(middle, ends, strict=True))]]


def test_rows_are_made_ready_now_and_again_and_those_that_are_not_there_asked_for(tmp_path, monkeypatch, way):
    files = [opened(tmp_path / name, 400) for name in ("weight", "state")]
    for file in files:
        file.write(np.arange(300), np.random.default_rng(0).integers(255, size=(300, PAGE), dtype=np.uint8))
    before = [file.file.read_bytes() for file in files]
    ahead, slots, fresh, told = Ahead(400, 64_000 * PAGE), np.arange(0, 300, 3), np.array([300, 302, 304]), []

    def tell(pages, address, runs, what):
        if len(runs):
            told.append((address, what, len(runs)))
        advice.advise(pages, address, runs, what)

    def fetched(*more):
        told.clear()
        ahead.keep_to_budget()
        ahead.fetch(files[:1], slots, files[1:], *more)
        ahead.wait()
        return told

    monkeypatch.setattr(rows, "advise", tell)
    weight, state = (file._address for file in files)
    asked = [(weight, mmap.MADV_WILLNEED, 100), (state, mmap.MADV_WILLNEED, 100)]
    ready = [(weight, rows.POPULATE_WRITE, 100), (state, rows.POPULATE_WRITE, 100)]
    assert fetched() == asked + ready
    assert fetched(fresh) == [(state, rows.POPULATE_WRITE, 3)]
    for turn in range(1, 280):  # other rows, a sixty-fourth of the budget each time
        ahead._gathered = 1001 * PAGE
        assert fetched() == (ready if turn % 8 == 0 else [])
    assert (ahead.cold, ahead.pages) == (200, 200)
    ahead.forget()
    assert fetched() == asked + ready
    assert [file.file.read_bytes() for file in files] == before
