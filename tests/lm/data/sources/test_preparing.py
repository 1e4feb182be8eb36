import gzip

import pytest

from memlayers.lm.data import DataConfig, prepare


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "not valid JSON: .*column 13"),
        (b'{"body": "x", "id": 1}', r"no field 'text' \(text_field\)"),
        ('{"text": "é\xff'.encode("latin-1") + b'"}', "not UTF-8 at byte 27"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.xz", "jsonl.gz", "jsonl.zst"])
def test_bad_lines_are_named_before_anything_is_written(written, tmp_path, line, message, suffix):
    path = written(f"docs.{suffix}", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"docs.{suffix}, line 2: {message}"):
        prepare(DataConfig(sources=(str(path),)), tmp_path / "corpus", progress=False)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "docs.json", "hollow", "*.jsonl"])
def test_what_is_no_source_is_refused_before_anything_is_written(tmp_path, name):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "docs.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="sources: "):
        prepare(DataConfig(sources=(str(tmp_path / name),)), tmp_path / "corpus", progress=False)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl"])
def test_a_blank_file_has_no_documents(written, tmp_path, name):
    with pytest.raises(ValueError, match="none of the 0 documents"):
        prepare(DataConfig(sources=(str(written(name, b"\n \n")),)), tmp_path / "corpus", progress=False)


@pytest.mark.parametrize("suffix", ["txt", "md.xz"])
def test_a_plain_text_has_held_out_documents(written, tmp_path, suffix):
    text = "\n\n".join(f"Paragraph {n}: " + "wörd " * (n % 90) for n in range(3000))
    path = written(f"book.{suffix}", text.encode())
    corpus = prepare(
        DataConfig(sources=(str(path),), holdout_percent=5, vocab_size=300), tmp_path / "corpus", progress=False
    )
    splits = [corpus.train, corpus.validation, corpus.test]
    assert sum(split.num_words for split in splits) == len(text.split())
    assert sum(split.num_bytes for split in splits) == len(text.encode())
    assert min(split.num_documents for split in splits) > 0


def test_a_folder_is_prepared_as_its_files_are(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        text = "".join(f"{number}, paragraph {n} with a few words.\n\n" * 9 for n in range(400))
        (folder / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    settings = {"holdout_percent": 10, "vocab_size": 300}
    named = tuple(str(folder / f"{number}.txt.gz") for number in range(3))
    corpora = [
        prepare(DataConfig(sources=sources, **settings), tmp_path / name, progress=False)
        for name, sources in {"folder": (str(folder),), "glob": (f"{folder}/*",), "files": named}.items()
    ]
    assert len({corpus.manifest["corpus_sha256"] for corpus in corpora}) == 1
