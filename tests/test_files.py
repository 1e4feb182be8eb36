import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from memlayers import files
from memlayers.files import (
    describe_files,
    file_aside,
    find_damage,
    finish_replacing,
    flush,
    move_into_place,
    new_folder,
    read_if_whole,
    read_sealed,
    remove_folder,
    replaced_together,
    sole_user,
    verify_files,
    write_json,
    write_sealed,
    write_text,
)


def test_a_sealed_file_is_json_and_comes_back(tmp_path):
    file = tmp_path / "manifest.json"
    write_sealed(file, {"name": "ä", "zeros": "0" * 64})
    assert read_sealed(file) == {"name": "ä", "zeros": "0" * 64}
    assert set(json.loads(file.read_text())) == {"sha256", "name", "zeros"}


def test_every_flipped_bit_and_every_truncation_of_a_sealed_file_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "manifest.json"
    write_sealed(file, {"format": 1, "text": "a b"})
    good = file.read_bytes()
    flipped = (good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :] for at in range(len(good)) for bit in range(8))
    for changed in (*flipped, *(good[:length] for length in range(len(good)))):
        with monkeypatch.context() as patch:
            patch.setattr(type(file), "read_bytes", lambda _, changed=changed: changed)
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


# What is on the disk when


def fill(folder):
    (folder / "below").mkdir()
    (folder / "below" / "a").write_text("a")
    (folder / "b").write_text("b")


def write_folder(folder):
    with new_folder(folder / "new") as aside:
        fill(aside)


def move_folder(folder):
    (folder / "aside").mkdir()
    fill(folder / "aside")
    move_into_place(folder / "aside", folder / "new")


def write_files(folder):
    with replaced_together(folder / "new") as aside:
        fill(aside)


WAYS = {
    "text": lambda folder: write_text(folder / "new", "text"),
    "json": lambda folder: write_json(folder / "new", {}),
    "sealed": lambda folder: write_sealed(folder / "new", {}),
    "new folder": write_folder,
    "moved folder": move_folder,
    "files of a folder": write_files,
}


def recorded(move, calls):
    def record(source, target):
        calls.append(("move", os.stat(source).st_ino, target))
        move(source, target)

    return record


@pytest.fixture
def calls(monkeypatch):
    """What is flushed and moved, in order: ("flush", inode), ("move", inode, new path)."""
    calls, fsync = [], os.fsync

    def flushed(descriptor):
        calls.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", flushed)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name), calls))
    return calls


@pytest.mark.parametrize("way", WAYS)
def test_all_is_on_the_disk_before_it_is_moved_and_the_name_after(tmp_path, calls, way):
    WAYS[way](tmp_path)
    moves = [place for place, call in enumerate(calls) if call[0] == "move"]
    assert moves
    first, last = moves[0], moves[-1]
    new = tmp_path / "new"
    written = {path.stat().st_ino for path in (new, *new.rglob("*"))}
    if way == "files of a folder":
        written.remove(new.stat().st_ino)  # which is there before
    assert written <= {inode for _, inode in calls[:first]}
    for _, _, target in (calls[place] for place in moves):
        assert ("flush", target.parent.stat().st_ino) in calls[last:]


def test_an_error_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "file", "old")

    def write_and_fail():
        with file_aside(tmp_path / "file") as aside:
            aside.write_text("new")
            raise RuntimeError

    def fill_and_fail(context):
        with context as aside:
            (aside / "file").write_text("new")
            raise RuntimeError

    for fail in (
        write_and_fail,
        lambda: fill_and_fail(new_folder(tmp_path / "folder")),
        lambda: fill_and_fail(replaced_together(tmp_path)),
    ):
        with pytest.raises(RuntimeError):
            fail()
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert (tmp_path / "file").read_text() == "old"


def test_a_name_that_is_taken_by_then_is_not_overwritten(tmp_path):
    def write_late():
        with new_folder(tmp_path / "new"):
            write_files(tmp_path)

    with pytest.raises(OSError, match="new"):
        write_late()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "b").read_text() == "b"


def test_files_of_a_folder_are_replaced_and_older_ones_of_the_pattern_go(tmp_path):
    for name in ("model-1", "model-2", "mine"):
        (tmp_path / name).write_text("old")
    with replaced_together(tmp_path, stale=r"model.*") as aside:
        (aside / "other").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model-1", "model-2", "other"]
    with replaced_together(tmp_path, stale=r"model.*") as aside:
        (aside / "model-1").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model-1", "other"]
    assert (tmp_path / "model-1").read_text() == "new"
    assert (tmp_path / "mine").read_text() == "old"


def test_config_json_comes_last_in_a_new_folder_and_first_over_an_old_one(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr("os.replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    for _ in range(2):
        with replaced_together(tmp_path / "new") as aside:
            for name in ("z.json", "config.json", "a"):
                (aside / name).write_text(name)
    assert moved == ["a", "z.json", "config.json", "config.json", "a", "z.json"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "a", "z.json"}


def test_files_of_a_folder_go_into_no_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="the folder to save to must be none or a folder, got the file .*file"):
        replaced_together(tmp_path / "file").__enter__()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_removed_has_another_name_meanwhile(tmp_path, monkeypatch):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name)
    remove_folder(tmp_path / "one" / "new")
    assert list((tmp_path / "one").iterdir()) == []
    monkeypatch.setattr("shutil.rmtree", lambda path: None)  # a process that is killed here
    remove_folder(tmp_path / "other" / "new")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [".new.removed"]


# What was written


def test_files_are_described_and_compared(tmp_path):
    fill(tmp_path)
    described = describe_files(tmp_path)
    assert described == {
        "b": {"bytes": 1, "sha256": hashlib.sha256(b"b").hexdigest()},
        "below/a": {"bytes": 1, "sha256": hashlib.sha256(b"a").hexdigest()},
    }
    assert describe_files(tmp_path, ["b"]) == {"b": described["b"]}
    checked = []
    verify_files(tmp_path, described, checked=checked.append)
    assert checked == ["b", "below/a"]
    assert list(find_damage(tmp_path, described)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "below/a is damaged: it is missing"),
        (b"", "below/a is damaged: it has 0 bytes, 1 were written"),
        (b"ab", "below/a is damaged: it has 2 bytes, 1 were written"),
        (b"c", "below/a is damaged: it is not what was written"),
    ],
)
def test_a_file_that_differs_is_named_with_what_is_wrong(tmp_path, content, message):
    fill(tmp_path)
    described = describe_files(tmp_path)
    (tmp_path / "below" / "a").unlink()
    if content is not None:
        (tmp_path / "below" / "a").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{message}"):
        verify_files(tmp_path, described)
    by_hash = {name: {"sha256": file["sha256"]} for name, file in described.items()}
    assert [name for name, _ in find_damage(tmp_path, by_hash)] == ["below/a"]


def test_links_out_of_the_folder_are_read_where_they_are_allowed_alone(tmp_path):
    (tmp_path / "kept").mkdir()
    fill(tmp_path / "kept")
    described = describe_files(tmp_path / "kept")
    linked = tmp_path / "linked"
    (linked / "below").mkdir(parents=True)
    for name in described:
        (linked / name).symlink_to(tmp_path / "kept" / name)
    checked = []
    verify_files(linked, described, checked=checked.append, links=True)
    assert checked == ["b", "below/a"]
    with pytest.raises(ValueError, match="is a link to outside of it"):
        verify_files(linked, described)


def test_a_file_of_another_size_is_named_before_any_is_read(tmp_path, monkeypatch):
    fill(tmp_path)
    described = describe_files(tmp_path)
    (tmp_path / "below" / "a").write_text("longer")
    monkeypatch.setattr(files, "file_sha256", lambda file: pytest.fail("read"))
    with pytest.raises(ValueError, match="below/a is damaged: it has 6 bytes, 1 were written"):
        verify_files(tmp_path, described)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "below/../../x",
        "/etc/passwd",
        "",
        ".",
        "..",
        "x\0",
        "c:x",
        "c:\\x",
        "\\\\host\\x",
        "..\\x",
        "a\\..\\..\\x",
        "//x",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    (tmp_path / "x").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    described = {name: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    for look in (
        lambda: verify_files(folder, described),
        lambda: list(find_damage(folder, described)),
        lambda: describe_files(folder, [name]),
    ):
        with pytest.raises(ValueError, match="is not the path of a file in it"):
            look()


def test_a_sealed_file_that_is_made_again_is_only_read_where_it_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    assert read_if_whole(file) == {}
    write_sealed(file, {"a": 1})
    assert read_if_whole(file) == {"a": 1}
    file.write_bytes(file.read_bytes()[:-1])
    assert read_if_whole(file) == {}
    # A disk that fails while it reads, whose error names no file.
    monkeypatch.setattr(type(file), "read_bytes", lambda self: refuse_with(errno.EIO)(0, 0))
    with pytest.raises(OSError, match=f"'{file}'") as raised:
        read_if_whole(file)
    assert raised.value.errno == errno.EIO


# Alone

HOLD = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
input()
if len(sys.argv) > 2:
    os.rename(sys.argv[1], sys.argv[2])
    if len(sys.argv) > 3:
        os.mkdir(sys.argv[1])
"""


@pytest.fixture
def hold():
    """Have another process hold a folder until a line is written to it; it may rename the folder then."""
    processes = []

    def hold(*arguments):
        command = [sys.executable, "-c", HOLD, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_folder_that_another_process_holds_is_refused_until_that_one_ends(tmp_path, hold):
    process = hold(tmp_path)
    with pytest.raises(ValueError, match="output must be a folder that no other process writes to, got "):
        sole_user(tmp_path).__enter__()
    process.kill()
    process.wait()
    with sole_user(tmp_path), pytest.raises(ValueError, match="no other process"):
        sole_user(tmp_path).__enter__()


@pytest.mark.parametrize("renamed", [(), ("renamed",), ("renamed", "made again")])
def test_who_waits_for_a_folder_has_it_next_unless_it_has_another_name(tmp_path, hold, capfd, renamed):
    folder = tmp_path / "folder"
    folder.mkdir()
    process = hold(folder, *(tmp_path / name for name in renamed))
    timer = threading.Timer(0.3, process.communicate, ["go on\n"])
    timer.start()
    context = sole_user(folder, waiting="waiting for it")
    if renamed:
        with pytest.raises(FileNotFoundError, match="folder"):
            context.__enter__()
    else:
        with context, pytest.raises(ValueError, match="no other process"):
            sole_user(folder).__enter__()
    timer.join()
    assert capfd.readouterr().err == "waiting for it\n"


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize(
    "code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL]
)
@pytest.mark.parametrize("waiting", ["", "waiting"])
def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch, code, waiting):
    monkeypatch.setattr("fcntl.flock", refuse_with(code))
    before = open_descriptors()
    with sole_user(tmp_path, waiting=waiting):
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
    with replaced_together(tmp_path / "files") as aside:
        (aside / "private").touch(mode=0o600)
    for name in ("new", "files"):
        assert (tmp_path / name / "private").stat().st_mode & 0o777 == (tmp_path / name).stat().st_mode & 0o666


# Several files, one save


def save_together(folder, version, *, shards=()):
    """Files that are of one version all, the newest of which has others than the one before."""
    with replaced_together(folder, stale=r"weights.*") as aside:
        for name in ("config.json", "memory_config.json", "other", *(shards or ["weights"])):
            (aside / name).write_text(version)


def read_together(folder):
    finish_replacing(folder)
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


class Killed(BaseException):
    pass


def fail_at(monkeypatch, number, killed):
    """The call of this number that changes a folder fails; of a process that is killed, all after it, too."""
    calls = []

    def failing(name, call):
        def fail(*args, **options):
            calls.append(name)
            if len(calls) == number or (killed and len(calls) > number):
                raise Killed(name) if killed else OSError(name)
            return call(*args, **options)

        return fail

    for name in ("rename", "replace", "unlink", "mkdir", "fsync", "rmdir"):
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    return calls


@pytest.mark.promise(
    "Saving and loading",
    "kill or break off a save over an earlier one",
    "supported",
    "the folder holds the earlier save or the new one, never a mixture",
)
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "an error"])
@pytest.mark.parametrize("shards", [(), ("weights-1", "weights-2")], ids=["one file", "shards"])
def test_a_save_that_breaks_off_anywhere_leaves_the_old_files_or_the_new(tmp_path, monkeypatch, killed, shards):
    seen, number = [], 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        save_together(folder, "old")
        old = read_together(folder)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, number, killed)
            with suppress(OSError, Killed):
                save_together(folder, "new", shards=shards)
        new = dict.fromkeys(("config.json", "memory_config.json", "other", *(shards or ["weights"])), "new")
        left = read_together(folder)
        assert left in (old, new)
        seen.append(left == new)
        save_together(folder, "newest")  # goes on from there
        assert read_together(folder) == dict.fromkeys(old, "newest")
        assert not any(path.name.startswith(".") for path in folder.iterdir())
        if len(calls) < number:
            break
    assert len(seen) > 15
    assert False in seen
    assert seen[-1]
    if killed:  # from some call on all is new
        assert seen == sorted(seen)


def test_a_new_folder_has_all_or_no_config(tmp_path, monkeypatch):
    for number in range(1, 40):
        with monkeypatch.context() as patch:
            fail_at(patch, number, killed=True)
            with suppress(Killed):
                save_together(tmp_path / str(number), "new")
        names = {path.name for path in (tmp_path / str(number)).glob("[!.]*")}
        assert "config.json" not in names or len(names) == 4


def test_what_cannot_be_finished_is_said(tmp_path, monkeypatch):
    save_together(tmp_path, "old")
    with monkeypatch.context() as patch:
        calls = fail_at(patch, 1000, killed=True)
        save_together(tmp_path, "new")
    commit = calls.index("replace", calls.index("rename")) + 1  # the first of the moves
    with monkeypatch.context() as patch:
        fail_at(patch, commit + 2, killed=True)
        with suppress(Killed):
            save_together(tmp_path, "newest")
    with monkeypatch.context() as patch:
        fail_at(patch, 1, killed=False)
        with pytest.raises(ValueError, match=r"holds a save that broke off half-way, .*\(replace\).* load it"):
            finish_replacing(tmp_path)
    assert set(read_together(tmp_path).values()) == {"newest"}


def test_what_no_save_has_left_is_not_moved(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    folder = tmp_path / "folder"
    (folder / ".saved-1").mkdir(parents=True)
    for journal in ("", "[]", "{}", '{"first": "", "stale": ["../elsewhere/mine"]}', '{"first": "", "stale": [1]}'):
        (folder / ".saved-1" / ".journal.json").write_text(journal)
        with pytest.raises(ValueError, match=r"\.saved-1 must be what a save has left, which it is not: remove it"):
            finish_replacing(folder)
    (folder / ".saved-1" / ".journal.json").unlink()
    (folder / ".saved-1").rmdir()
    (folder / ".saved-1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".journal.json").write_text('{"first": "", "stale": []}')
    with pytest.raises(ValueError, match="it is a link"):
        finish_replacing(folder)
    assert (tmp_path / "elsewhere" / "mine").read_text() == "mine"


SAVING = """
import sys
from pathlib import Path
from files import replaced_together  # alone: the package takes seconds to import
for number in range(10):
    with replaced_together(sys.argv[1]) as aside:
        for name in ("config.json", "a", "b"):
            (aside / name).write_text(f"{sys.argv[2]} {number}")
"""


@pytest.mark.promise(
    "Saving and loading", "save to one folder from several threads or processes", "supported", "one after the other"
)
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_those_who_save_to_one_folder_wait_for_each_other(tmp_path, capfd, kind):
    if kind == "threads":
        threads = [threading.Thread(target=save_together, args=(tmp_path, str(number))) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        source = str(Path(files.__file__).parent)
        environment = {**os.environ, "PYTHONPATH": source}
        command = [sys.executable, "-c", SAVING, str(tmp_path)]
        running = [subprocess.Popen([*command, name], env=environment) for name in ("first", "second")]
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert len(set(read_together(tmp_path).values())) == 1
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
