import errno
import json
import os
import threading
import time

import pytest

from memlayers.lm.data import DataConfig, prepare, request
from memlayers.lm.data.sources import JsonLines, base


@pytest.fixture
def sources(tmp_path):
    for name in ("a", "b"):
        rows = [{"id": f"{name}{number}", "text": f"tea {name}{number} and a cup of it " * 5} for number in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")


def config(sources, **changes):
    return DataConfig(**({"sources": sources, "vocab_size": 257, "holdout_percent": 10} | changes))


def unreadable(*_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_hashing_shows_its_progress_for_large_sources_only(sources, tmp_path, monkeypatch, capfd):
    prepare(config(sources), tmp_path / "one")
    assert "hashing" not in capfd.readouterr().err
    monkeypatch.setattr(request, "SHOWN_BYTES", 1000)
    monkeypatch.setattr(base, "HASHED_AT_ONCE", 1000)
    prepare(config(sources), tmp_path / "two")
    assert "hashing: 100%" in capfd.readouterr().err
    prepare(config(sources), tmp_path / "two")  # all of it is known
    assert "hashing" not in capfd.readouterr().err
    prepare(config(sources), tmp_path / "three", progress=False)
    assert capfd.readouterr() == ("", "")


def test_an_interruption_does_not_wait_for_what_is_being_hashed(sources, tmp_path, monkeypatch):
    pieces, begun = [], threading.Event()

    def describe(self, *, read):
        for piece in range(1000):
            pieces.append(piece)
            read(1)
            begun.set()
            time.sleep(0.01)

    class Pool(request.ThreadPoolExecutor):
        def map(self, *arguments):
            super().map(*arguments)
            assert begun.wait(20)
            raise KeyboardInterrupt

    monkeypatch.setattr(JsonLines, "describe", describe)
    monkeypatch.setattr(request, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(sources), tmp_path / "corpus", progress=False)
    assert 0 < len(pieces) < 500
    assert not (tmp_path / ".corpus.partial").exists()


def test_a_file_that_changes_while_it_is_hashed_is_noticed(sources, tmp_path, monkeypatch):
    describe = JsonLines.describe

    def describe_and_change(self, **named):
        described = describe(self, **named)
        self.file.write_bytes(self.file.read_bytes() + b'{"text": "more"}\n')
        return described

    monkeypatch.setattr(JsonLines, "describe", describe_and_change)
    with pytest.raises(ValueError, match="a.jsonl changed while it was read"):
        prepare(config(sources), tmp_path / "corpus", progress=False)


@pytest.mark.parametrize("part", ["open_sources", "describe", "stamp"])
def test_a_source_that_is_there_but_cannot_be_read_does_not_break_a_ready_corpus(sources, tmp_path, monkeypatch, part):
    made = prepare(config(sources), tmp_path / "corpus", progress=False)
    os.utime(sources[0])  # so that it would have to be read
    if part == "open_sources":
        monkeypatch.setattr(request, "open_sources", unreadable)
    else:
        monkeypatch.setattr(JsonLines, part, unreadable)
    assert prepare(config(sources), tmp_path / "corpus", progress=False).manifest == made.manifest
    with pytest.raises(ValueError, match="vocab_size 257, asked for 258"):
        prepare(config(sources, vocab_size=258), tmp_path / "corpus", progress=False)
    with pytest.raises(PermissionError):  # it is another source in that place
        prepare(config(sources[::-1]), tmp_path / "corpus", progress=False)
    monkeypatch.setattr(JsonLines, "describe", unreadable)
    with pytest.raises(PermissionError):
        prepare(config(sources), tmp_path / "new", progress=False)
