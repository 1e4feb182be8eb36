import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayers.lm.data.sources import streams
from memlayers.lm.data.sources.text import TEXT_DOCUMENT_CHARACTERS, cut_text

PACKED = ["txt", "txt.gz", "txt.xz", "txt.zst"]


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xe6\x97"])
@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("before", ["", "abc\n", "\ufeffé", "é" * 10_000])
def test_text_that_is_not_utf8_is_named_with_its_byte(written, read, monkeypatch, bad, suffix, before):
    monkeypatch.setattr(streams, "READ_BYTES", 7)
    path = written(f"book.{suffix}", before.encode() + bad)
    with pytest.raises(ValueError, match=f"book.{suffix}: not UTF-8 at byte {len(before.encode())}$"):
        read(path)


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("before", ["", "abc\n", "\ufeffé", "é" * 10_000])
def test_a_zero_byte_is_named_with_its_place(written, read, monkeypatch, suffix, before):
    monkeypatch.setattr(streams, "READ_BYTES", 7)
    path = written(f"image.{suffix}", before.encode() + b"\0rest\0")
    skipped = []
    with pytest.raises(ValueError, match=f"image.{suffix}: not a text: a zero byte at byte {len(before.encode())}$"):
        read(path, skip=skipped.append)
    assert skipped == []


def test_of_two_faults_the_first_is_named(written, read):
    with pytest.raises(ValueError, match="not UTF-8 at byte 2"):
        read(written("book.txt", b"ab\xff\0"))


@pytest.mark.parametrize(
    ("mark", "name"),
    [
        (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"),
        (codecs.BOM_UTF32_LE, "UTF-32"),
        (codecs.BOM_UTF32_BE, "UTF-32"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "txt.gz"])
def test_the_mark_of_another_encoding_is_named(written, read, suffix, mark, name):
    path = written(f"book.{suffix}", mark + '{"text": "x"}'.encode("utf-16-le"))
    with pytest.raises(ValueError, match=f"book.{suffix}.*: not UTF-8 at byte 0: it begins with a {name} byte-order"):
        read(path, skip=lambda message: None)


@pytest.mark.parametrize("suffix", PACKED)
def test_a_byte_order_mark_is_no_text(written, read, suffix):
    path = written(f"book.{suffix}", "\ufeffone\r\ntwo".encode())
    assert [document.text for document in read(path)] == ["one\r\ntwo"]


def test_a_blank_text_is_one_blank_document(written, read):
    assert read(written("blank.txt", b"\n \n")) == [("\n \n", "\n \n")]


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
def test_a_plain_text_becomes_documents_that_begin_with_paragraphs(written, read, suffix):
    text = "\n\n".join(f"Paragraph {n}: " + "wörd " * (n % 90) for n in range(3000))
    path = written(f"book.{suffix}", text.encode())
    documents = read(path)
    assert "".join(document.text for document in documents) == text
    assert all(document.key == document.text for document in documents)
    assert max(len(document.text) for document in documents) <= TEXT_DOCUMENT_CHARACTERS
    assert all(document.text.startswith("Paragraph") for document in documents)
