import errno
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from memlayers.lm.data import DataConfig, encode, open_corpus, prepare
from memlayers.lm.data.encode import read_ahead
from memlayers.lm.data.sources import JsonLines

prepare_module = importlib.import_module("memlayers.lm.data.prepare")
SHARD_TOKENS = 1200


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of two files, and another file: about six shards."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "two").mkdir()
    draw = np.random.default_rng(0)
    for name in ("two/a.jsonl", "two/b.jsonl", "c.jsonl"):
        rows = [
            {"id": f"{name} {number}", "text": " ".join(draw.choice(["tea", "cup", "pot", "milk"], size=50))}
            for number in range(60)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(folder / "two"), str(folder / "c.jsonl"))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(encode, "SHARD_TOKENS", SHARD_TOKENS)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 2000)


def config(sources, **changes):
    return DataConfig(**({"sources": sources, "vocab_size": 268, "holdout_percent": 10} | changes))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """What an uninterrupted run leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "SHARD_TOKENS", SHARD_TOKENS)
        corpus = prepare(config(sources), tmp_path_factory.mktemp("whole") / "corpus", progress=False)
    assert len(corpus.train.shards) >= 5
    return contents(corpus.folder)


def stop_after(monkeypatch, count, error):
    """Let `count` batches be encoded, then raise."""
    done = itertools.count()
    encode_texts = encode.encode_texts

    def encode_or_stop(tokenizer, texts):
        if next(done) >= count:
            raise error
        return encode_texts(tokenizer, texts)

    monkeypatch.setattr(encode, "encode_texts", encode_or_stop)


def interrupt(sources, folder, *, after=12, error=KeyboardInterrupt):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, after, error)
        with pytest.raises(error if isinstance(error, type) else type(error)) as raised:
            prepare(config(sources), folder, progress=False)
    return raised.value


KILLER = """
    import itertools, os, signal, sys
    import transformers
    from memlayers.lm.data import encode
    from memlayers.lm.data import DataConfig, open_corpus, prepare

    transformers.PreTrainedTokenizerFast  # loaded once, before the forks
    encode.SHARD_TOKENS, encode.BATCH_CHARACTERS = {shard_tokens}, 2000
    config = DataConfig(sources={sources!r}, vocab_size=268, holdout_percent=10)

    def child(folder, moments):
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1]
        left = iter(range(moments)) if moments is not None else itertools.count()
        for name in ("fsync", "replace", "rename", "unlink"):
            def call(*arguments, real=getattr(os, name), **named):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)
            setattr(os, name, call)
        prepare(config, folder, progress=False)
        os._exit(0)

    for moments in itertools.count(1, {step}):
        status = child(f"at-{{moments}}", moments)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not os.path.exists(f"at-{{moments}}") or open_corpus(f"at-{{moments}}")
        assert child(f"at-{{moments}}", None) == 0
    # One folder that is killed again and again.
    for times in itertools.count(1):
        if child("often", 30 + 5 * times) == 0:
            break
    print(times)
"""


def test_killed_at_any_moment_a_run_ends_with_the_same_files(sources, whole, tmp_path):
    script = KILLER.format(sources=sources, shard_tokens=SHARD_TOKENS, step=23)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2
    made = sorted(path.name for path in tmp_path.iterdir())
    assert len(made) > 5
    assert not [name for name in made if name.startswith(".")]
    for name in made:
        assert contents(tmp_path / name) == whole


def test_an_interrupted_run_goes_on_where_it_was(sources, whole, tmp_path, monkeypatch):
    error = interrupt(sources, tmp_path / "corpus")
    assert ".corpus.partial; the same command resumes there" in error.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == [".corpus.partial"]
    with pytest.raises(ValueError, match="holds no prepared corpus"):
        open_corpus(tmp_path / "corpus")
    encoded, encode_texts = [], encode.encode_texts
    monkeypatch.setattr(encode, "encode_texts", lambda *args: encoded.extend(args[1]) or encode_texts(*args))
    monkeypatch.setattr(prepare_module, "survey_documents", lambda *_: pytest.fail("read everything again"))
    monkeypatch.setattr(prepare_module, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(JsonLines, "describe", lambda *_, **__: pytest.fail("hashed again"))
    prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(tmp_path / "corpus") == whole
    assert 0 < len(encoded) < 150
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_files_before_the_place_that_was_reached_are_not_read_again(sources, whole, tmp_path, monkeypatch):
    interrupt(sources, tmp_path / "corpus", after=11)
    read, documents = [], JsonLines.documents
    monkeypatch.setattr(
        JsonLines, "documents", lambda self, **named: read.append(self.file.name) or documents(self, **named)
    )
    prepare(config(sources), tmp_path / "corpus", progress=False)
    assert read == ["b.jsonl", "c.jsonl"]
    assert contents(tmp_path / "corpus") == whole


def test_progress_goes_on_where_it_was(sources, tmp_path, capfd):
    interrupt(sources, tmp_path / "corpus")
    prepare(config(sources), tmp_path / "corpus", progress=True)
    shown = capfd.readouterr().err
    assert "encoding: 100%" in shown
    assert "encoding:   0%" not in shown
    assert "reading" not in shown


def test_a_damaged_span_is_made_again(sources, whole, tmp_path):
    for name in (
        "train-00000.tokens",
        "validation-00001.entries",
        "span-00001.json",
        "tokenizer/tokenizer.json",
        "survey.json",
    ):
        interrupt(sources, tmp_path / "corpus")
        file = tmp_path / ".corpus.partial" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        (tmp_path / ".corpus.partial" / "train-00099.tokens").write_bytes(b"left over")
        prepare(config(sources), tmp_path / "corpus", progress=False)
        assert contents(tmp_path / "corpus") == whole
        (tmp_path / "corpus").rename(tmp_path / name.replace("/", "-"))


def fail_at_the_last_step(sources, folder):
    rename = os.rename

    def fail(aside, target):
        if target == folder:
            raise PermissionError
        rename(aside, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(PermissionError):
            prepare(config(sources), folder, progress=False)


def test_what_failed_at_the_last_step_is_not_done_again(sources, whole, tmp_path, monkeypatch):
    fail_at_the_last_step(sources, tmp_path / "corpus")
    monkeypatch.setattr(prepare_module, "survey_documents", lambda *_: pytest.fail("read everything again"))
    monkeypatch.setattr(encode, "encode_texts", lambda *_: pytest.fail("encoded again"))
    prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(tmp_path / "corpus") == whole


def refuses(sources, folder, difference, **changes):
    """Another request is refused, and what was begun is left as it is."""
    aside = folder.with_name(f".{folder.name}.partial")
    before = contents(aside)
    assert any(name.startswith("train-") for name in before)
    message = f"{aside} holds the beginning of a corpus that was asked for otherwise ({difference}); remove it to start"
    with pytest.raises(ValueError, match="^" + re.escape(message)) as raised:
        prepare(config(sources, **changes), folder, progress=False)
    assert not hasattr(raised.value, "__notes__")
    assert contents(aside) == before


def test_shards_of_another_size_are_not_continued(sources, whole, tmp_path, monkeypatch):
    interrupt(sources, tmp_path / "corpus")
    with monkeypatch.context() as patch:
        patch.setattr(encode, "SHARD_TOKENS", 700)
        refuses(sources, tmp_path / "corpus", "shards of 1200 tokens, now 700")
    prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(tmp_path / "corpus") == whole


def test_a_mistyped_option_does_not_cost_what_was_begun(sources, whole, tmp_path):
    interrupt(sources, tmp_path / "corpus")
    refuses(sources, tmp_path / "corpus", "vocab_size 268, asked for 262", vocab_size=262)
    prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(tmp_path / "corpus") == whole


def test_another_version_of_a_package_does_not_cost_what_was_begun(sources, whole, tmp_path, monkeypatch):
    interrupt(sources, tmp_path / "corpus")
    now = prepare_module._versions()
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_versions", lambda: now | {"numpy": "9.9"})
        refuses(sources, tmp_path / "corpus", f"numpy {now['numpy']}, now 9.9")
    prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(tmp_path / "corpus") == whole


def test_changed_sources_do_not_cost_what_was_begun(tmp_path, sources):
    source = tmp_path / "docs.jsonl"
    lines = Path(sources[1]).read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join(lines))
    interrupt((str(source),), tmp_path / "corpus", after=6)
    source.write_bytes(b"".join(lines[::-1]))
    refuses((str(source),), tmp_path / "corpus", "sources with other contents")


def test_another_request_does_not_cost_what_only_lacks_its_name(sources, whole, tmp_path):
    fail_at_the_last_step(sources, tmp_path / "corpus")
    refuses(sources, tmp_path / "corpus", "vocab_size 268, asked for 262", vocab_size=262)
    prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(tmp_path / "corpus") == whole


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize(
    "name", ["survey.json", "span-00001.json", "train-00000.tokens", "test-00000.entries", "tokenizer/tokenizer.json"]
)
def test_a_disk_that_fails_for_a_moment_does_not_cost_what_was_begun(sources, tmp_path, monkeypatch, name, number):
    interrupt(sources, tmp_path / "corpus")
    aside = tmp_path / ".corpus.partial"
    before, opening = contents(aside), Path.open

    class Failing:
        """As a file that can be opened, but not read."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, *_):
            raise OSError(number, os.strerror(number))

        readinto = getbuffer = fileno = read
        readable, seekable = (lambda self: True), (lambda self: False)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: Failing() if self == aside / name else opening(self, *a, **k))
        with pytest.raises(OSError, match=f"{os.strerror(number)}: '{aside / name}'"):
            prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(aside) == before


def swap_lines_unseen(source, first, second):
    """Exchange two lines of equal length; size and time stay what they were."""
    status = source.stat()
    lines = source.read_bytes().splitlines(keepends=True)
    lines[first], lines[second] = lines[second], lines[first]
    source.write_bytes(b"".join(lines))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("place", [0, 58])
def test_a_source_that_changes_meanwhile_is_noticed(sources, tmp_path, monkeypatch, place):
    source = tmp_path / "docs.jsonl"
    source.write_bytes(Path(sources[1]).read_bytes())
    interrupt((str(source),), tmp_path / "corpus", after=6)
    swap_lines_unseen(source, place, place + 1)
    with pytest.raises(ValueError, match="docs.jsonl changed while it was read"):
        prepare(config((str(source),)), tmp_path / "corpus", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]

    train_tokenizer = prepare_module.train_tokenizer

    def train_and_change(*arguments):
        swap_lines_unseen(source, place, place + 1)
        return train_tokenizer(*arguments)

    monkeypatch.setattr(prepare_module, "train_tokenizer", train_and_change)
    with pytest.raises(ValueError, match="docs.jsonl changed while it was read"):
        prepare(config((str(source),)), tmp_path / "corpus", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


def test_a_document_that_was_encoded_and_then_put_back_is_noticed(sources, tmp_path):
    source = tmp_path / "docs.jsonl"
    source.write_bytes(Path(sources[1]).read_bytes())
    train_tokenizer = prepare_module.train_tokenizer

    def train_and_change(*arguments):
        swap_lines_unseen(source, 0, 1)
        return train_tokenizer(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "train_tokenizer", train_and_change)
        interrupt((str(source),), tmp_path / "corpus", after=6)
    swap_lines_unseen(source, 0, 1)
    assert list(tmp_path.glob(".corpus.partial/train-*.tokens"))
    with pytest.raises(ValueError, match="docs.jsonl changed while it was read"):
        prepare(config((str(source),)), tmp_path / "corpus", progress=False)


def test_a_file_that_changes_while_it_is_first_read_is_noticed(sources, tmp_path, monkeypatch):
    source = tmp_path / "docs.jsonl"
    source.write_bytes(Path(sources[1]).read_bytes())
    survey = prepare_module.survey_documents

    def survey_and_touch(*arguments):
        os.utime(source)
        return survey(*arguments)

    monkeypatch.setattr(prepare_module, "survey_documents", survey_and_touch)
    with pytest.raises(ValueError, match="docs.jsonl changed while it was read"):
        prepare(config((str(source),)), tmp_path / "corpus", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_before_there_is_anything_to_keep_leaves_nothing(sources, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "train_tokenizer", fail)
        with pytest.raises(error):
            prepare(config(sources), tmp_path / "corpus", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_with_the_room_that_is_needed(sources, whole, tmp_path):
    error = interrupt(sources, tmp_path / "corpus", error=OSError(errno.ENOSPC, "No space left on device"))
    assert error.errno == errno.ENOSPC
    assert error.filename == str(tmp_path / "corpus")
    assert "MB are free, and all of it about 0 MB" in str(error)
    assert "resumes there" in error.__notes__[0]
    prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(tmp_path / "corpus") == whole


# Two at a time


def in_threads(*calls):
    results = [None] * len(calls)

    def run(place, call):
        try:
            results[place] = call()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    return threads, results


@pytest.mark.parametrize("fails", [False, True])
def test_a_second_run_waits_for_the_first(sources, whole, tmp_path, monkeypatch, capfd, fails):
    started, go_on, trained = threading.Event(), threading.Event(), []
    train_tokenizer = prepare_module.train_tokenizer

    def train(*arguments):
        trained.append(1)
        started.set()
        assert go_on.wait(20)
        if fails and len(trained) == 1:
            raise RuntimeError("out of luck")
        return train_tokenizer(*arguments)

    monkeypatch.setattr(prepare_module, "train_tokenizer", train)
    threads, results = in_threads(*[lambda: prepare(config(sources), tmp_path / "corpus", progress=False)] * 2)
    threads[0].start()
    assert started.wait(20)
    threads[1].start()
    said = ""
    for _ in range(200):
        said += capfd.readouterr().err
        if said.endswith("\n"):  # words and newline may be two writes
            break
        time.sleep(0.05)
    assert said == f"waiting for another process that prepares {tmp_path / 'corpus'}\n"
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(trained) == 1 + fails
    assert isinstance(results[0], RuntimeError) == fails
    assert contents(results[1].folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_without_locks_the_first_to_finish_is_used(sources, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    rename = os.rename

    def overtaken(aside, folder):
        if folder.name != "corpus":
            return rename(aside, folder)
        monkeypatch.setattr(os, "rename", rename)
        prepare(config(sources), tmp_path / "other", progress=False)
        rename(tmp_path / "other", folder)
        return rename(aside, folder)

    monkeypatch.setattr(os, "rename", overtaken)
    assert contents(prepare(config(sources), tmp_path / "corpus", progress=False).folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


# Reading ahead


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_reading_goes_on_while_a_batch_is_worked_on():
    taken, ahead = [], threading.Event()

    def items():
        for number in range(100):
            taken.append(number)
            if number == 19:
                ahead.set()
            yield number

    with read_ahead(items(), size=lambda _: 1, limit=10) as batches:
        first = next(batches)
        assert ahead.wait(20)
        time.sleep(0.05)
        assert first == list(range(10))
        assert len(taken) == 20  # one list ahead: the reader is bounded
        assert [item for batch in batches for item in batch] == list(range(10, 100))
    assert not readers()


def test_an_error_of_the_reader_comes_after_the_lists_before_it():
    def items():
        yield from range(20)
        raise ValueError("line 21")

    seen = []
    with pytest.raises(ValueError, match="line 21"), read_ahead(items(), size=lambda _: 1, limit=10) as batches:
        seen.extend(batches)
    assert seen == [list(range(10)), list(range(10, 20))]
    assert not readers()


@pytest.mark.parametrize("items", [lambda: itertools.count(), lambda: itertools.repeat(None)])
def test_the_reader_ends_with_the_call_whatever_happens(items):
    closed, begun = [], threading.Event()

    def size(_):
        return 1

    def take(batches):
        with suppress(RuntimeError):  # the context may be left before it has asked for the next list
            next(batches, None)

    def endless():
        begun.set()
        try:
            yield from items()
        finally:
            closed.append(1)

    def work():
        with read_ahead(endless(), size=size, limit=10) as batches:
            threading.Thread(target=take, args=(batches,), daemon=True).start()
            assert begun.wait(20)
            assert readers()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not readers()
    assert closed


# Memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    script = """
        import json, random, resource
        from memlayers.lm.data import encode
        from memlayers.lm.data import DataConfig, prepare

        encode.SHARD_TOKENS, encode.BATCH_CHARACTERS = 1 << 16, 1 << 17
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(300)]
        peaks = []
        for name, count in (("small", 1500), ("large", 15000)):
            with open(f"{name}.jsonl", "w") as stream:
                for number in range(count):
                    stream.write(json.dumps({"id": number, "text": " ".join(draw.choices(words, k=100))}) + "\\n")
            config = DataConfig(
                sources=(f"{name}.jsonl",), vocab_size=600, tokenizer_megabytes=0.2, holdout_percent=5
            )
            prepare(config, name, progress=False)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print((peaks[1] - peaks[0]) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8  # MB, for 10 MB of text


@pytest.mark.promise(
    "Command line and files",
    "`memlayers prepare` where a hidden folder beside its output has the name of its working folder and other files",
    "refused",
    "nothing is removed; move them away",
)
def test_a_working_folder_with_files_of_somebody_else_is_left_alone(sources, tmp_path):
    aside = tmp_path / ".corpus.partial"
    aside.mkdir()
    for name in ("notes.txt", "span-00000.json"):
        (aside / name).write_text("mine")
    with pytest.raises(ValueError, match="holds 'notes.txt', which is no part of one: move it away"):
        prepare(config(sources), tmp_path / "corpus", progress=False)
    assert contents(aside) == {"notes.txt": b"mine", "span-00000.json": b"mine"}
