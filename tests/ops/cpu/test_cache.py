"""Kernels on disk: kept, compiled again where damaged, in memory where nothing can be kept."""

import gc
import os
import stat
from pathlib import Path

import pytest
from numba import types

from memlayers.ops.cpu import cache

SIGNATURE = types.int64(types.int64)


def twice(x):
    return 2 * x


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where kernels are kept in this test; nothing was said yet."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    cache._made.cache_clear()
    cache._said.cache_clear()
    yield tmp_path / "memlayers" / "kernels"
    cache._made.cache_clear()
    cache._said.cache_clear()


def compiled(sources="1"):
    """Whether a tiny kernel came from the disk, once it was seen to work."""
    kernel = cache.compile_kept(twice, SIGNATURE, {}, sources)
    assert kernel.ctypes(21) == 42
    return bool(kernel.cache_hits)


def test_a_kernel_is_compiled_once(folder):
    assert [compiled(), compiled()] == [False, True]
    (file,) = folder.iterdir()
    assert file.name.startswith("test_cache.twice-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("is_on", [True, False])
def test_compiling_leaves_the_collector_as_it_was(folder, is_on):
    before = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    try:
        compiled()
        assert gc.isenabled() is is_on
    finally:
        (gc.enable if before else gc.disable)()


def test_a_mask_that_lets_a_group_write_changes_nothing(folder):
    before = os.umask(0o002)
    try:
        assert [compiled(), compiled()] == [False, True]
    finally:
        os.umask(before)


def test_other_sources_are_other_kernels(folder):
    assert [compiled("1"), compiled("2"), compiled("1")] == [False, False, True]


@pytest.mark.promise(
    "Command line and files",
    "a compiled kernel on disk that a power loss left empty, cut off or damaged",
    "supported",
    "it is compiled again and replaced",
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:20],
        lambda raw: raw[:-1],
        lambda raw: raw[:100] + bytes([raw[100] ^ 1]) + raw[101:],
        lambda raw: bytes(len(raw)),
    ],
    ids=["empty", "within the checksum", "cut off", "a bit", "zeros"],
)
def test_a_damaged_file_is_compiled_again_and_replaced(folder, damage, capsys):
    compiled()
    (file,) = folder.iterdir()
    raw = file.read_bytes()
    file.write_bytes(damage(raw))
    assert [compiled(), compiled()] == [False, True]
    assert list(folder.iterdir()) == [file]
    assert capsys.readouterr().err == ""


def test_a_file_that_is_whole_and_no_kernel_is_compiled_again(folder):
    import hashlib
    import pickle

    compiled()
    (file,) = folder.iterdir()
    content = pickle.dumps(("another", "version"))
    file.write_bytes(hashlib.sha256(content).digest() + content)
    assert [compiled(), compiled()] == [False, True]


@pytest.mark.promise(
    "Command line and files",
    "a folder for compiled kernels on a full or read-only disk",
    "supported",
    "they are compiled in memory, which is said once",
)
def test_a_full_disk_is_said_once_and_nothing_is_left(folder, monkeypatch, capsys):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "flush", full)
    assert [compiled(), compiled()] == [False, False]
    assert list(folder.iterdir()) == []
    said = capsys.readouterr().err
    assert said.startswith(f"memlayers: kernels are compiled in memory, each process anew, for {folder} cannot be wr")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_folder_that_cannot_be_made_is_said_once(folder, monkeypatch, capsys, error):
    def fail(self, *_, **__):
        raise error

    monkeypatch.setattr(Path, "mkdir", fail)
    assert [compiled(), compiled()] == [False, False]
    assert f"{folder} cannot be used: {error.strerror}. NUMBA_CACHE_DIR names" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["folder", "parent", "link"])
def test_a_folder_that_others_can_write_to_is_not_believed(folder, tmp_path, capsys, place):
    assert [compiled(), compiled()] == [False, True]
    if place == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        (folder if place == "folder" else folder.parent).chmod(0o777)
    cache._made.cache_clear()
    assert compiled() is False
    assert "others can write to it, or it belongs to another user" in capsys.readouterr().err


def test_what_belongs_to_another_user_is_not_believed(folder, monkeypatch):
    compiled()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert compiled() is False  # the file
    cache._made.cache_clear()
    assert cache.cache_folder() is None


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
def test_where_kernels_are_kept(folder, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv(variable, str(tmp_path / "other"))
    assert cache.cache_folder() == tmp_path / "other" / "memlayers" / "kernels"
