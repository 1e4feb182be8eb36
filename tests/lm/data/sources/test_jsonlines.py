import pytest

from memlayers.lm.data.sources import streams

PACKED = ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst"]
MALFORMED = [
    (b'{"text": "x"', "not valid JSON: .*column 13"),
    (b'{"text": "x\0"}', "not valid JSON"),
    (b'{"text": ' + b"[" * 100_000, "not readable as JSON"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not readable as JSON"),
    (b'"text"', "expected a JSON object, found str"),
    (b'{"body": "x", "id": 1}', r"no field 'text' \(text_field\); it has 'body', 'id'"),
    (b'{"text": 3}', "field 'text' is int, expected a string"),
    (b'{"text": null}', "field 'text' is NoneType"),
    (b'{"text": "x", "id": [1]}', "field 'id' is list"),
    (b'{"text": "x", "id": true}', "field 'id' is bool"),
    (b'{"text": "\\ud800"}', "a string holds a lone surrogate"),
    ('{"text": "é\xff'.encode("latin-1") + b'"}', "not UTF-8 at byte 27"),
]


@pytest.mark.parametrize("suffix", [*PACKED, "JSONL"])
def test_json_lines(written, read, suffix):
    lines = (
        '\ufeff{"id": "a", "text": "x\\u2028y"}\n\n{"id": 7, "text": "é"}\r\n{"id": null, "text": "z"}\n{"text": "w"}'
    )
    path = written(f"docs.{suffix}", lines.encode())
    assert read(path) == [("a", "x\u2028y"), ("7", "é"), ("z", "z"), ("w", "w")]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_a_bad_line_raises_or_is_skipped(written, read, line, message):
    path = written("docs.jsonl.zst", b'{"text": "good"}\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(ValueError, match=f"docs.jsonl.zst, line 2: {message}"):
        read(path)
    skipped = []
    assert read(path, skip=skipped.append) == [("good", "good"), ("after", "after")]
    with pytest.raises(ValueError, match=f"docs.jsonl.zst, line 2: {message}"):
        raise ValueError(*skipped)


def test_the_byte_of_a_fault_counts_the_byte_order_mark_and_skipped_lines(written, read):
    path = written("docs.jsonl", b'\xef\xbb\xbf\xff\n{"text": "\xff"}\n')
    skipped = []
    assert read(path, skip=skipped.append) == []
    assert [message.split(": ")[1] for message in skipped] == ["not UTF-8 at byte 3", "not UTF-8 at byte 15"]


@pytest.mark.parametrize("suffix", PACKED)
def test_a_line_without_an_end_is_not_read_into_memory(written, read, monkeypatch, suffix):
    line = b'{"text": "12345"}'
    monkeypatch.setattr(streams, "LONGEST_LINE", len(line) + 1)
    assert len(read(written(f"docs.{suffix}", line + b"\n" + line))) == 2
    path = written(f"docs.{suffix}", line + b"\n" + line + b" \n" + line)
    with pytest.raises(ValueError, match=f"docs.{suffix}, line 2: longer than {len(line) + 1} bytes"):
        read(path, skip=lambda message: None)


@pytest.mark.parametrize("content", [b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
def test_blank_lines_are_no_documents(written, read, content):
    assert read(written("blank.jsonl", content)) == []


@pytest.mark.parametrize("suffix", [".ndjson", ".jsonlines", ".NDJSON", ".ndjson.gz"])
def test_other_suffixes_are_of_json_lines_too(written, read, tmp_path, suffix):
    path = written(f"folder/docs{suffix}", b'{"text": "one", "id": "a"}\n')
    assert read(path) == read(path.parent) == [("a", "one")]


def test_an_empty_id_is_none(written, read):
    (document,) = read(written("docs.jsonl", b'{"text": "one", "id": ""}\n'))
    assert document.key is document.text
    assert [document.key for document in read(written("docs.jsonl", b'{"text": "one", "id": 0}\n'))] == ["0"]
