import hashlib
import lzma
import sysconfig
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayers.lm import corpora
from memlayers.lm.corpora import JsonLines, StandardLibrary, TextFile, cut_text, open_source
from memlayers.lm.data import DataConfig, prepare


def read(path):
    return list(open_source(str(path), text_field="text", id_field="id").documents())


def written(folder, name, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.xz"])
def test_json_lines(tmp_path, suffix):
    lines = (
        '\ufeff{"id": "a", "text": "x\\u2028y"}\n\n{"id": 7, "text": "é"}\r\n{"id": null, "text": "z"}\n{"text": "w"}'
    )
    path = written(tmp_path, f"docs.{suffix}", lines.encode())
    assert read(path) == [("a", "x\u2028y"), ("7", "é"), ("z", "z"), ("w", "w")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "line 2: not valid JSON: .*column 13"),
        (b'{"text": ' + b"[" * 100_000, "line 2: not readable as JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 2: not readable as JSON"),
        (b'"text"', "line 2: expected a JSON object, found str"),
        (b'{"body": "x", "id": 1}', r"line 2: no field 'text' \(text_field\); it has 'body', 'id'"),
        (b'{"text": 3}', "line 2: field 'text' is int, expected a string"),
        (b'{"text": null}', "line 2: field 'text' is NoneType"),
        (b'{"text": "x", "id": [1]}', "line 2: field 'id' is list"),
        (b'{"text": "x", "id": true}', "line 2: field 'id' is bool"),
        (b'{"text": "\\ud800"}', "line 2: a string holds a lone surrogate"),
        ('{"text": "é\xff'.encode("latin-1") + b'"}', "line 2: not UTF-8 at byte 27"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.xz"])
def test_bad_lines_are_named_before_anything_is_written(tmp_path, line, message, suffix):
    path = written(tmp_path, f"docs.{suffix}", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"docs.{suffix}, {message}"):
        prepare(DataConfig(sources=(str(path),)), tmp_path / "corpus", progress=False)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xe6\x97"])
@pytest.mark.parametrize("suffix", ["txt", "txt.xz"])
@pytest.mark.parametrize("before", ["", "abc\n", "\ufeffé", "é" * 10_000])
def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path, monkeypatch, bad, suffix, before):
    monkeypatch.setattr(corpora, "READ_BYTES", 7)
    path = written(tmp_path, f"book.{suffix}", before.encode() + bad)
    with pytest.raises(ValueError, match=f"book.{suffix}: not UTF-8 at byte {len(before.encode())}$"):
        read(path)


@pytest.mark.parametrize("name", ["book.txt.xz", "docs.jsonl.xz"])
@pytest.mark.parametrize("spoil", [lambda packed: packed[:-20], lambda packed: b"plain text"])
def test_xz_that_is_cut_off_or_none_is_named(tmp_path, name, spoil):
    (tmp_path / name).write_bytes(spoil(lzma.compress(b'{"text": "x"}\n' * 1000)))
    with pytest.raises(ValueError, match=f"{name}: not a complete xz file"):
        read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["txt", "txt.xz"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = written(tmp_path, f"book.{suffix}", "\ufeffone\r\ntwo".encode())
    assert [document.text for document in read(path)] == ["one\r\ntwo"]


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.xz", "book.txt", "book.txt.xz"])
def test_files_are_read_in_bounded_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpora, "READ_BYTES", 1 << 16)
    line = b'{"text": "%s"}\n' % (b"word " * 2000)
    path = written(tmp_path, name, line * 1600)  # 16 MB
    source = open_source(str(path), text_field="text", id_field="id")
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in source.documents()) >= 16_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    dictionary = 8 << 20 if path.suffix == ".xz" else 0  # of xz's default preset
    assert peak < dictionary + 1_500_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "sources: no such file: .*missing.txt"),
        ("folder", "folder is not a file"),
        ("empty.txt", "empty.txt is empty"),
        ("docs.json", "docs.json is neither plain text nor JSON lines"),
        ("docs.json.xz", "docs.json.xz is neither"),
        ("docs.txt.gz", "docs.txt.gz is neither"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    for other in ("docs.json", "docs.json.xz", "docs.txt.gz"):
        (tmp_path / other).write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        prepare(DataConfig(sources=(str(tmp_path / name),)), tmp_path / "corpus", progress=False)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl"])
def test_a_blank_file_has_no_documents(tmp_path, name):
    with pytest.raises(ValueError, match="none of the 0 documents"):
        prepare(DataConfig(sources=(str(written(tmp_path, name, b"\n \n")),)), tmp_path / "corpus", progress=False)


@given(st.text("ab \n\t\u2003é", max_size=200), st.integers(1, 40), st.integers(1, 50))
@settings(deadline=None)
def test_cut_text_loses_nothing_and_cuts_no_word_that_fits(text, limit, chunk):
    documents = list(cut_text((text[i : i + chunk] for i in range(0, len(text), chunk)), limit))
    assert "".join(documents) == text
    assert all(0 < len(document) <= limit for document in documents)
    assert documents == list(cut_text(iter([text]), limit))
    if all(len(word) < limit for word in text.split()):
        assert sum(len(document.split()) for document in documents) == len(text.split())


def test_cut_text_prefers_blank_lines_then_white_space():
    text = "one two\n\nthree four\nfive six seven eight nine ten"
    assert list(cut_text(iter([text]), 22)) == ["one two\n\n", "three four\nfive six ", "seven eight nine ten"]


@pytest.mark.parametrize("suffix", ["txt", "md.xz"])
def test_a_plain_text_becomes_documents_with_held_out_ones(tmp_path, suffix):
    text = "\n\n".join(f"Paragraph {n}: " + "wörd " * (n % 90) for n in range(3000))
    source = written(tmp_path, f"book.{suffix}", text.encode())
    documents = read(source)
    assert "".join(document.text for document in documents) == text
    assert all(document.key == document.text for document in documents)
    assert max(len(document.text) for document in documents) <= corpora.TEXT_DOCUMENT_CHARACTERS
    assert all(document.text.startswith("Paragraph") for document in documents)
    corpus = prepare(
        DataConfig(sources=(str(source),), holdout_percent=5, vocab_size=300), tmp_path / "corpus", progress=False
    )
    splits = [corpus.train, corpus.validation, corpus.test]
    assert sum(split.num_words for split in splits) == len(text.split())
    assert sum(split.num_bytes for split in splits) == len(text.encode())
    assert min(split.num_documents for split in splits) > 0


def test_sources_are_described_by_their_bytes(tmp_path):
    content = b'{"text": "x"}'
    path = written(tmp_path, "docs.jsonl", content)
    assert JsonLines(path).describe() == {
        "format": "jsonl",
        "name": "docs.jsonl",
        "bytes": 13,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert TextFile(path).describe()["format"] == "text"


def test_the_standard_library_without_tests_packages_and_generated_files(tmp_path):
    kept = ["abc.py", "json/__init__.py", "json/decoder.py", "unittest/case.py", "zipfile.py"]
    dropped = [
        "test/test_abc.py",
        "unittest/test/test_case.py",
        "idlelib/idle_test/htest.py",
        "lib2to3/tests/data/x.py",
        "site-packages/torch/__init__.py",
        "dist-packages/apt.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "sitecustomize.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "LICENSE.txt",
    ]
    for name in [*dropped, *reversed(kept)]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    library = StandardLibrary(tmp_path)
    assert list(library.documents()) == [(name, f"# {name}\n") for name in kept]
    before = library.describe()
    assert (before["files"], before["bytes"]) == (5, sum(len(f"# {name}\n") for name in kept))
    (tmp_path / "abc.py").rename(tmp_path / "abd.py")
    assert library.describe()["sha256"] != before["sha256"]


def test_a_library_without_sources_or_not_utf8_is_named(tmp_path):
    with pytest.raises(ValueError, match="no source files"):
        StandardLibrary(tmp_path).describe()
    (tmp_path / "bad.py").write_bytes(b"ok\xff")
    with pytest.raises(ValueError, match=r"bad\.py: not UTF-8 at byte 2"):
        list(StandardLibrary(tmp_path).documents())


def test_the_running_standard_library():
    documents = list(StandardLibrary().documents())
    names = [document.key for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name or "/tests/" in name]
    assert len(names) > 500
    assert (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text("utf-8") in [d.text for d in documents]
