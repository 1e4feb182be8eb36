import errno
import json
import os

import pytest

from memlayers import files
from memlayers.files import flush, new_folder, read_sealed, sole_user, write_sealed, write_text


def test_a_sealed_file_is_json_and_comes_back(tmp_path):
    file = tmp_path / "manifest.json"
    write_sealed(file, {"name": "ä", "zeros": "0" * 64})
    assert read_sealed(file) == {"name": "ä", "zeros": "0" * 64}
    assert set(json.loads(file.read_text())) == {"sha256", "name", "zeros"}


def test_every_flipped_bit_and_every_truncation_of_a_sealed_file_is_noticed(tmp_path):
    file = tmp_path / "manifest.json"
    write_sealed(file, {"format": 1, "text": "a b"})
    good = file.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            with pytest.raises(ValueError, match="manifest.json is damaged"):
                read_sealed(file)
        file.write_bytes(good[:place])
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            read_sealed(file)
    file.unlink()
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        read_sealed(file)


def test_text_is_written_as_it_is_and_its_name_reaches_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path, (tmp_path / "a.txt").exists())))
    # As Windows writes text.
    monkeypatch.setattr(
        type(tmp_path), "write_text", lambda self, text, **_: self.write_bytes(text.replace("\n", "\r\n").encode())
    )
    write_text(tmp_path / "a.txt", "one\ntwo\r\nä")
    assert (tmp_path / "a.txt").read_bytes() == "one\ntwo\r\nä".encode()
    assert flushed == [(tmp_path / ".a.txt.partial", False), (tmp_path, True)]


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch, code):
    monkeypatch.setattr("fcntl.flock", refuse_with(code))
    before = open_descriptors()
    with sole_user(tmp_path):
        entered = True
    assert entered
    assert open_descriptors() == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize(("code", "kind"), [(errno.EWOULDBLOCK, ValueError), (errno.EINTR, InterruptedError)])
def test_a_lock_that_is_refused_leaves_no_descriptor(tmp_path, monkeypatch, code, kind):
    monkeypatch.setattr("fcntl.flock", refuse_with(code))
    before = open_descriptors()
    with pytest.raises(kind), sole_user(tmp_path):
        raise AssertionError
    assert open_descriptors() == before


def refuse_with(code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    return flock


def test_windows_flushes_files_that_it_may_write_and_no_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WINDOWS", True)
    file = tmp_path / "a.txt"
    file.touch()
    opened = []
    original = os.open

    def record(path, flags):
        opened.append((path, flags))
        return original(path, flags)

    monkeypatch.setattr(files.os, "open", record)
    flush(tmp_path)
    flush(file)
    assert opened == [(file, os.O_RDWR)]


def test_what_is_written_can_be_read_by_whom_the_folder_can(tmp_path):
    """Some libraries keep their files from others."""
    with new_folder(tmp_path / "new") as aside:
        (aside / "private").touch(mode=0o600)
    assert (tmp_path / "new" / "private").stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o666
