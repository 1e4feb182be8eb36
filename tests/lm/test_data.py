import hashlib
import itertools
import json
import lzma
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayers.lm import data as data_module
from memlayers.lm.corpora import Document
from memlayers.lm.data import SPLITS, Corpus, DataConfig, Split, Windows, open_corpus, prepare
from memlayers.lm.tokenize import encode_documents, token_dtype, train_tokenizer

WORDS = ["the", "memory", "layer", "reads", "rows", "of", "its", "table", "élan", "日本", "<|endoftext|>", "12,5\n"]


def records(count, *, ids=True):
    generator = np.random.default_rng(0)
    for number in range(count):
        text = " ".join(generator.choice(WORDS, size=generator.integers(1, 60))) + f" {number}"
        yield {"id": f"doc-{number}", "text": text} if ids else {"text": text}


def write_jsonl(path, rows):
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return str(path)


def config(*sources, **changes):
    return DataConfig(**({"sources": sources, "vocab_size": 300, "holdout_percent": 10} | changes))


def make(source, folder, **changes):
    return prepare(config(source, **changes), folder, progress=False)


def texts(corpus: Corpus, split: Split) -> list[str]:
    tokenizer = corpus.tokenizer()
    bounds = [*split.documents["offset"].tolist(), split.num_tokens]
    return [tokenizer.decode(split.tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(bounds)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "docs.jsonl", records(400))


@pytest.fixture(scope="module")
def corpus(source, tmp_path_factory):
    return make(source, tmp_path_factory.mktemp("prepared") / "corpus")


def test_every_document_comes_back_in_the_split_of_its_id(corpus):
    expected = {name: [] for name in SPLITS}
    for row in records(400):
        h = int(hashlib.md5(row["id"].encode()).hexdigest(), 16) % 100
        expected["validation" if h < 10 else "test" if h < 20 else "train"].append(row["text"])
    for name in SPLITS:
        split = getattr(corpus, name)
        assert sorted(texts(corpus, split)) == sorted(expected[name])
        assert split.num_documents == len(expected[name]) > 10


def test_documents_have_their_words_and_bytes(corpus):
    for name in SPLITS:
        split = getattr(corpus, name)
        decoded = texts(corpus, split)
        assert split.documents["words"].tolist() == [len(text.split()) for text in decoded]
        assert split.documents["bytes"].tolist() == [len(text.encode()) for text in decoded]
        assert (split.num_words, split.num_bytes) == (len(" ".join(decoded).split()), len("".join(decoded).encode()))
        counts = corpus.manifest["splits"][name]
        assert counts == {
            "documents": split.num_documents,
            "tokens": split.num_tokens,
            "words": split.num_words,
            "bytes": split.num_bytes,
        }


def test_each_document_begins_with_end_of_text_and_has_it_nowhere_else(corpus):
    for split in (corpus.train, corpus.validation, corpus.test):
        assert np.flatnonzero(split.tokens == corpus.eot_id).tolist() == split.documents["offset"].tolist()


def test_documents_are_ordered_by_hash_not_by_place(corpus):
    numbers = [int(text.rsplit(" ", 1)[1]) for text in texts(corpus, corpus.train)]
    hashes = [int(hashlib.md5(f"doc-{number}".encode()).hexdigest(), 16) // 100 for number in numbers]
    assert hashes == sorted(hashes)
    assert numbers != sorted(numbers)


def test_the_default_share_is_that_of_the_news_corpus():
    assert DataConfig(sources=("news.jsonl",)).resolved_holdout_percent() == 1
    assert DataConfig().resolved_holdout_percent() == 5
    assert DataConfig(holdout_percent=2).resolved_holdout_percent() == 2


def test_tokenizer_for_transformers_agrees_with_the_token_files(corpus):
    tokenizer = corpus.tokenizer()
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == corpus.eot_id
    assert len(tokenizer) == corpus.vocab_size <= 300
    text = next(text for text in texts(corpus, corpus.train) if "<|endoftext|>" not in text)
    begin = texts(corpus, corpus.train).index(text)
    start, end = corpus.train.documents["offset"][begin : begin + 2]
    assert tokenizer(text)["input_ids"] == corpus.train.tokens[start + 1 : end].tolist()
    assert tokenizer("<|endoftext|>")["input_ids"] == [corpus.eot_id]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text, some more text\n"], 260)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    [(document, tokens)] = encode_documents(tokenizer, [Document("key", text)])
    assert document.text == text
    assert tokens[0] == 0 == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.decode(tokens[1:]) == text


def test_plain_and_xz_give_the_same_corpus(source, corpus, tmp_path):
    packed = make(write_jsonl(tmp_path / "docs.jsonl.xz", records(400)), tmp_path / "corpus")
    assert packed.manifest["corpus_sha256"] == corpus.manifest["corpus_sha256"]
    ours, theirs = contents(packed.folder), contents(corpus.folder)
    assert set(ours) == {"manifest.json", "tokenizer.json"} | {
        f"{name}.{suffix}" for name in SPLITS for suffix in ("tokens", "documents.npy")
    }
    del ours["manifest.json"], theirs["manifest.json"]
    assert ours == theirs


@pytest.mark.parametrize("field", ["id", "text"])
def test_the_corpus_hash_changes_with_one_letter(corpus, tmp_path, field):
    rows = list(records(400))
    rows[7][field] += "!"
    changed = make(write_jsonl(tmp_path / "docs.jsonl", rows), tmp_path / "corpus")
    assert changed.manifest["corpus_sha256"] != corpus.manifest["corpus_sha256"]


def test_equal_texts_without_ids_share_a_split(tmp_path):
    rows = [row for row in records(300, ids=False) for _ in range(2)]
    corpus = make(write_jsonl(tmp_path / "docs.jsonl", rows), tmp_path / "corpus")
    seen = [set(texts(corpus, getattr(corpus, name))) for name in SPLITS]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 300


def test_several_sources_and_other_field_names(tmp_path):
    rows = [{"body": row["text"], "key": number} for number, row in enumerate(records(300))]
    first = write_jsonl(tmp_path / "a.jsonl", rows[:100])
    second = write_jsonl(tmp_path / "b.jsonl.xz", rows[100:])
    corpus = prepare(config(first, second, text_field="body", id_field="key"), tmp_path / "corpus", progress=False)
    assert sum(getattr(corpus, name).num_documents for name in SPLITS) == 300
    assert [source["name"] for source in corpus.manifest["asked"]["sources"]] == ["a.jsonl", "b.jsonl.xz"]
    validation = [row for row in rows if int(hashlib.md5(str(row["key"]).encode()).hexdigest(), 16) % 100 < 10]
    assert corpus.validation.num_documents == len(validation)


def test_blank_documents_are_left_out_and_counted(tmp_path):
    rows = [*records(100), {"id": "x", "text": ""}, {"id": "y", "text": " \n"}]
    corpus = make(write_jsonl(tmp_path / "docs.jsonl", rows), tmp_path / "corpus")
    assert corpus.manifest["blank_documents"] == 2
    assert sum(getattr(corpus, name).num_documents for name in SPLITS) == 100


def test_the_tokenizer_learns_from_training_documents_only(tmp_path):
    rows = list(records(300))
    for row in rows:
        if int(hashlib.md5(row["id"].encode()).hexdigest(), 16) % 100 < 20:
            row["text"] += " zzqqzz" * 50
    corpus = make(write_jsonl(tmp_path / "docs.jsonl", rows), tmp_path / "corpus", vocab_size=400)
    assert not [token for token in corpus.tokenizer().get_vocab() if "zq" in token or "qz" in token]


def test_the_tokenizer_sample_has_the_stated_size_whatever_the_order(tmp_path):
    rows = list(records(300))
    made = [
        make(write_jsonl(tmp_path / f"{name}.jsonl", order), tmp_path / name, tokenizer_megabytes=0.01)
        for name, order in (("forward", rows), ("backward", rows[::-1]))
    ]
    for corpus in made:
        # The first training documents, just enough of them.
        trained_on = corpus.manifest["tokenizer"]["trained_on_bytes"]
        ends = np.cumsum(corpus.train.documents["bytes"])
        assert trained_on == ends[np.searchsorted(ends, 10_000)]
    assert made[0].tokenizer_path.read_bytes() == made[1].tokenizer_path.read_bytes()
    assert np.array_equal(made[0].train.tokens, made[1].train.tokens)


def test_tokens_are_as_narrow_as_the_vocabulary_allows(corpus):
    assert corpus.train.tokens.dtype == np.uint16
    assert isinstance(corpus.train.tokens, np.memmap)
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_wide_tokens(source, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "token_dtype", lambda vocab_size: np.dtype("<u4"))
    wide = make(source, tmp_path / "wide")
    assert wide.train.tokens.dtype == np.uint32
    assert np.array_equal(wide.train.tokens, corpus.train.tokens)


# Reuse, and folders that are left alone


def test_a_finished_folder_is_reused(source, tmp_path, monkeypatch):
    first = make(source, tmp_path / "corpus")
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(source).read_bytes())
    monkeypatch.setattr(data_module, "train_tokenizer", lambda *_: pytest.fail("tokenised again"))
    again = make(str(moved), tmp_path / "corpus")
    assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 310}, "vocab_size 300, asked for 310"),
        ({"holdout_percent": 11}, "holdout_percent 10, asked for 11"),
        ({"tokenizer_megabytes": 1.0}, "tokenizer_megabytes 16.0, asked for 1.0"),
    ],
)
def test_a_corpus_prepared_otherwise_is_left_alone(source, corpus, changes, message):
    before = contents(corpus.folder)
    with pytest.raises(ValueError, match=message):
        make(source, corpus.folder, **changes)
    assert contents(corpus.folder) == before


def test_changed_sources_are_noticed(corpus, tmp_path):
    other = write_jsonl(tmp_path / "docs.jsonl", list(records(401)))
    with pytest.raises(ValueError, match="sources with other contents"):
        make(other, corpus.folder)


@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json"])
def test_a_folder_with_something_else_is_left_alone(source, tmp_path, monkeypatch, name):
    monkeypatch.setattr(data_module, "train_tokenizer", lambda *_: pytest.fail("tokenised for nothing"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text("[]")
    with pytest.raises(ValueError, match="holds no prepared corpus"):
        make(source, folder)
    assert contents(folder) == {name: b"[]"}
    with pytest.raises(ValueError, match="holds no prepared corpus"):
        make(source, folder / name)


def test_an_empty_folder_and_missing_parents_are_fine(source, tmp_path):
    (tmp_path / "empty").mkdir()
    assert make(source, tmp_path / "empty").train.num_documents
    assert make(source, tmp_path / "a" / "b").train.num_documents


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["memlayers.lm.data.encode_documents", "memlayers.files.flush"])
def test_a_failed_run_leaves_nothing(source, tmp_path, monkeypatch, step, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(error):
            make(source, tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []
    assert make(source, tmp_path / "corpus").train.num_documents


def test_a_killed_run_leaves_nothing_that_looks_finished(source, tmp_path):
    script = f"""
        import os, signal
        from memlayers import files
        from memlayers.lm import data
        files.flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        config = data.DataConfig(sources=({source!r},), vocab_size=300, holdout_percent=10)
        data.prepare(config, "corpus", progress=False)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=False)
    assert killed.returncode < 0
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    with pytest.raises(ValueError, match="holds no prepared corpus"):
        open_corpus(tmp_path / "corpus")
    assert make(source, tmp_path / "corpus").train.num_documents


def test_a_run_that_comes_second_uses_the_first_ones_folder(source, tmp_path, monkeypatch):
    rename = os.rename

    def overtaken(aside, folder):
        monkeypatch.setattr(os, "rename", rename)
        make(source, folder)
        rename(aside, folder)

    monkeypatch.setattr(os, "rename", overtaken)
    assert make(source, tmp_path / "corpus").train.num_documents
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    source = tmp_path / "docs.jsonl"
    write_jsonl(source, records(300))

    def train_and_change(sample, vocab_size):
        write_jsonl(source, records(299))
        return train_tokenizer(sample, vocab_size)

    monkeypatch.setattr(data_module, "train_tokenizer", train_and_change)
    with pytest.raises(ValueError, match="changed while it was read"):
        make(str(source), tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


def damage_tokens(folder):
    with (folder / "test.tokens").open("ab") as stream:
        stream.truncate(10)


def damage_documents(folder):
    np.save(folder / "validation.documents.npy", np.zeros(3))


def damage_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def damage_format(folder):
    (folder / "manifest.json").write_text('{"format": 99}')


def damage_missing(folder):
    (folder / "train.tokens").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_tokens, "test.tokens should have"),
        (damage_documents, "validation.documents.npy should have"),
        (damage_tokenizer, "tokenizer.json is not"),
        (damage_format, "format 99"),
        (damage_missing, "train.tokens"),
    ],
)
def test_damage_is_noticed(source, tmp_path, damage, message):
    folder = make(source, tmp_path / "corpus").folder
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_corpus(folder)


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 256}, "vocab_size must be an integer from 257 .* got 256"),
        ({"vocab_size": 300.0}, "vocab_size"),
        ({"holdout_percent": 0}, "holdout_percent must be an integer from 1 to 49"),
        ({"holdout_percent": 50}, "holdout_percent"),
        ({"tokenizer_megabytes": 0}, "tokenizer_megabytes must be a finite number above 0"),
        ({"tokenizer_megabytes": float("inf")}, "tokenizer_megabytes"),
        ({"sources": "docs.jsonl"}, "sources must be a list"),
        ({"text_field": ""}, "text_field must be the name of a field"),
        ({"id_field": 3}, "id_field"),
    ],
)
def test_settings_are_checked_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


def test_a_split_without_documents_is_refused_before_tokenising(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "train_tokenizer", lambda *_: pytest.fail("tokenised"))
    source = write_jsonl(tmp_path / "docs.jsonl", records(3))
    with pytest.raises(ValueError, match=r"none of the 3 documents falls into the .* split with holdout_percent 10"):
        make(source, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


# Prefixes and windows


def small_split():
    documents = np.zeros(4, data_module.DOCUMENT)
    documents["offset"], documents["words"], documents["bytes"] = [0, 3, 4, 9], [1, 2, 3, 4], [10, 20, 30, 40]
    return Split(np.arange(11, dtype=np.uint16), documents)


@pytest.mark.parametrize(
    ("max_tokens", "documents", "tokens"),
    [(1, 1, 3), (3, 1, 3), (4, 2, 4), (8, 2, 4), (9, 3, 9), (11, 4, 11), (99, 4, 11)],
)
def test_prefix_is_of_whole_documents(max_tokens, documents, tokens):
    prefix = small_split().prefix(max_tokens)
    assert (prefix.num_documents, prefix.num_tokens) == (documents, tokens)
    assert prefix.num_words == sum(range(1, documents + 1))
    assert prefix.num_bytes == 10 * prefix.num_words
    assert prefix.tokens.tolist() == list(range(tokens))


def test_prefix_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        small_split().prefix(0)


def test_windows_cover_the_split_without_overlap():
    windows = Windows(small_split(), 3)
    assert len(windows) == 3
    items = list(windows)
    assert torch.cat([item["input_ids"] for item in items]).tolist() == list(range(9))
    for item in items:
        assert item["input_ids"].dtype == torch.int64
        assert torch.equal(item["labels"], item["input_ids"])
    with pytest.raises(IndexError):
        windows[3]


@pytest.mark.parametrize("length", [1, 12, 2.0])
def test_windows_need_a_length_that_fits(length):
    with pytest.raises(ValueError, match="length must be an integer from 2 to the split's 11 tokens"):
        Windows(small_split(), length)


def test_windows_go_through_a_data_loader(corpus):
    loader = torch.utils.data.DataLoader(Windows(corpus.train, 16), batch_size=4, shuffle=True, num_workers=0)
    batch = next(iter(loader))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)


def test_ready_token_files_need_neither_tokenizers_nor_transformers(corpus):
    script = f"""
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("tokenizers", "transformers", "tqdm"):
                    raise ImportError(name)

        sys.meta_path.insert(0, Block())
        from memlayers.lm.data import Windows, open_corpus
        corpus = open_corpus({str(corpus.folder)!r})
        print(len(Windows(corpus.train, 16)), corpus.vocab_size, corpus.validation.prefix(100).num_words)
        try:
            corpus.tokenizer()
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=100
    )
    windows, words = len(Windows(corpus.train, 16)), corpus.validation.prefix(100).num_words
    assert done.stdout == f"{windows} {corpus.vocab_size} {words}\ntransformers\n"


def test_progress_is_shown_when_asked_for(source, tmp_path, capfd):
    prepare(config(source), tmp_path / "corpus", progress=True)
    shown = capfd.readouterr()
    assert "encoding: 100%" in shown.err
    assert shown.out == ""
    make(source, tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
