import errno
import hashlib
import importlib
import itertools
import json
import lzma
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from memlayers.lm.data import DataConfig, encode, prepare, spans
from memlayers.lm.data import survey as survey_module
from memlayers.lm.data import tokenize as tokenize_module
from memlayers.lm.data.corpus import SPLITS, Corpus, Split
from memlayers.lm.data.tokenize import cut_runs, encode_texts, save_tokenizer, token_dtype, train_tokenizer

prepare_module = importlib.import_module("memlayers.lm.data.prepare")
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
    tokens = split.tokens
    bounds = [*split.documents["offset"].tolist(), split.num_tokens]
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(bounds)]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hash_of(key):
    return int(hashlib.md5(key.encode()).hexdigest(), 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "docs.jsonl", records(400))


@pytest.fixture(scope="module")
def corpus(source, tmp_path_factory):
    return make(source, tmp_path_factory.mktemp("prepared") / "corpus")


# What comes out


def test_a_corpus_is_the_one_that_every_version_of_this_format_makes(tmp_path, monkeypatch):
    """Literals: shards, their order and all hashes are those of version 0.1.0."""
    monkeypatch.setattr(encode, "SHARD_TOKENS", 2500)
    words = ["tea", "cup", "pot", "milk"]
    rows = [{"id": n, "text": " ".join(words[(n * n + k * (n + 1)) % 4] for k in range(n % 7 + 3))} for n in range(300)]
    source = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "no id"}])
    manifest = make(source, tmp_path / "corpus", vocab_size=257).manifest
    assert manifest["corpus_sha256"] == "f4d2dd632669ba8d0a5ac9259e84677e50eaac9cc0f93c6fe8385e5cc5ec10f3"
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    assert {shard["name"]: [digest[:16] for digest in shard["sha256"].values()] for shard in shards} == {
        "train-00000": ["a1a03c25d47cdfbc", "f2d22bb7726e19fc"],
        "train-00001": ["366e19e3dfb82f12", "1cb3753950bd341e"],
        "train-00002": ["3d84bc7d3916c7d0", "be321bfd31e5537e"],
        "validation": ["e8ada44beed8cc22", "204f28f24dfb4c78"],
        "test": ["5bec269a505231b9", "565785d22bf6a117"],
    }


def test_documents_of_equal_rank_keep_their_order():
    entries = np.zeros(1000, spans.PART)
    entries["rank"], entries["tokens"], entries["words"] = np.arange(1000) % 3, 1, np.arange(1000)
    ordered, tokens = spans.by_rank(entries, np.arange(1000, dtype=np.uint16))
    expected = [*range(0, 1000, 3), *range(1, 1000, 3), *range(2, 1000, 3)]
    assert ordered["words"].tolist() == tokens.tolist() == expected


def test_sizes_that_the_documentation_names():
    assert encode.SHARD_TOKENS == 16_777_216
    assert spans.MERGED_BYTES == 33_554_432
    settings = DataConfig()
    assert (settings.vocab_size, settings.tokenizer_megabytes, settings.resolved_holdout_percent()) == (8192, 16.0, 5)
    assert DataConfig(sources=("a",)).resolved_holdout_percent() == 1


@pytest.mark.parametrize("shard_tokens", [1 << 24, 1000])
def test_every_document_comes_back_in_the_split_of_its_id(source, tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(encode, "SHARD_TOKENS", shard_tokens)
    corpus = make(source, tmp_path / "corpus")
    assert (len(corpus.train.shards) > 3) == (shard_tokens == 1000)
    expected = {name: [] for name in SPLITS}
    for row in records(400):
        h = hash_of(row["id"]) % 100
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


def test_documents_of_a_shard_are_ordered_by_hash_not_by_place(corpus):
    numbers = [int(text.rsplit(" ", 1)[1]) for text in texts(corpus, corpus.train)]
    hashes = [hash_of(f"doc-{number}") // 100 for number in numbers]
    assert hashes == sorted(hashes)
    assert numbers != sorted(numbers)


def test_held_out_documents_are_the_same_in_one_part_and_in_many(source, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(spans, "MERGED_BYTES", 700)
    many = contents(make(source, tmp_path / "corpus").folder)
    for name in ("validation.tokens", "validation.documents.npy", "test.tokens", "test.documents.npy"):
        assert many[name] == (corpus.folder / name).read_bytes()


def test_documents_files_are_what_numpy_saves(corpus, tmp_path):
    for name in ("train-00000", "test"):
        documents = np.load(corpus.folder / f"{name}.documents.npy")
        np.save(tmp_path / "saved.npy", documents)
        assert (tmp_path / "saved.npy").read_bytes() == (corpus.folder / f"{name}.documents.npy").read_bytes()


def test_a_shard_ends_with_the_document_that_fills_it(source, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD_TOKENS", 1000)
    corpus = make(source, tmp_path / "corpus")
    *full, last = corpus.train.shards
    numbers = []
    for shard in full:
        assert len(shard.tokens) >= 1000
        numbers.append([int(text.rsplit(" ", 1)[1]) for text in texts(corpus, Split.of([shard]))])
        latest = numbers[-1].index(max(numbers[-1]))
        ends = [*shard.documents["offset"][1:].tolist(), len(shard.tokens)]
        assert len(shard.tokens) - (ends[latest] - shard.documents["offset"][latest]) < 1000
    assert len(last.tokens) > 0
    flat = [number for shard in numbers for number in sorted(shard)]
    assert flat == sorted(flat)


def test_held_out_tokens_are_bounded_like_training_tokens(source, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD_TOKENS", 1000)
    held, write = [], spans.SpanWriter.write
    monkeypatch.setattr(spans.SpanWriter, "write", lambda self, end: held.append(self.longest) or write(self, end))
    make(source, tmp_path / "corpus", holdout_percent=49)
    assert max(held) < 1400


def test_tokenizer_for_transformers_agrees_with_the_token_files(corpus):
    tokenizer = corpus.tokenizer()
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == corpus.eot_id
    assert len(tokenizer) == corpus.vocab_size == 300
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
    [tokens] = encode_texts(tokenizer, [text])
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert 0 not in tokens


def test_plain_and_xz_give_the_same_corpus(source, corpus, tmp_path):
    packed = make(write_jsonl(tmp_path / "docs.jsonl.xz", records(400)), tmp_path / "corpus")
    assert packed.manifest["corpus_sha256"] == corpus.manifest["corpus_sha256"]
    ours, theirs = contents(packed.folder), contents(corpus.folder)
    assert set(ours) == {"manifest.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} | {
        f"{name}.{suffix}" for name in ("train-00000", "validation", "test") for suffix in ("tokens", "documents.npy")
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
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "a.jsonl", rows[:50])
    write_jsonl(tmp_path / "folder" / "b.jsonl", rows[50:100])
    last = write_jsonl(tmp_path / "c.jsonl.xz", rows[100:])
    asked = config(str(tmp_path / "folder"), last, text_field="body", id_field="key")
    corpus = prepare(asked, tmp_path / "corpus", progress=False)
    assert sum(getattr(corpus, name).num_documents for name in SPLITS) == 300
    names = [[file["name"] for file in entry["files"]] for entry in corpus.manifest["asked"]["sources"]]
    assert names == [["a.jsonl", "b.jsonl"], ["c.jsonl.xz"]]
    assert [entry["name"] for entry in corpus.manifest["asked"]["sources"]] == list(asked.sources)
    for shard, numbers in zip(corpus.train.shards, (range(100), range(100, 300)), strict=True):
        own = [int(text.rsplit(" ", 1)[1]) for text in texts(corpus, Split.of([shard]))]
        assert set(own) == {number for number in numbers if hash_of(str(number)) % 100 >= 20}
    assert [shard.source for shard in corpus.train.shards] == [0, 1]


def test_blank_documents_are_left_out_and_counted(tmp_path):
    rows = [*records(100), {"id": "x", "text": ""}, {"id": "y", "text": " \n"}]
    corpus = make(write_jsonl(tmp_path / "docs.jsonl", rows), tmp_path / "corpus")
    assert corpus.manifest["blank_documents"] == 2
    assert sum(getattr(corpus, name).num_documents for name in SPLITS) == 100


def test_malformed_records_stop_the_work_or_are_counted(tmp_path):
    rows = [*records(100), {"id": "x"}, {"id": "y", "text": 3}]
    source = write_jsonl(tmp_path / "docs.jsonl", rows)
    with pytest.raises(ValueError, match="docs.jsonl, line 101"):
        make(source, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]
    corpus = make(source, tmp_path / "corpus", skip_malformed=True)
    assert corpus.manifest["malformed_records"] == 2
    assert sum(getattr(corpus, name).num_documents for name in SPLITS) == 100


def test_a_tokenizer_whose_numbers_have_gaps(tmp_path):
    words = {"<|endoftext|>": 70_000, "<unk>": 3, "a": 5, "b": 66_000}  # beyond 16 bits, though there are four of them
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(tokens, tmp_path / "tokenizer")
    rows = [{"text": f"a b {number}"} for number in range(60)]
    corpus = make(
        write_jsonl(tmp_path / "text.jsonl", rows), tmp_path / "corpus", tokenizer=str(tmp_path / "tokenizer")
    )
    assert corpus.vocab_size == 70_001
    assert corpus.train.tokens[:4].tolist() == [70_000, 5, 66_000, 3]


@pytest.mark.promise(
    "Command line and files",
    "`--data.tokenizer` with a tokenizer that says where to cut texts and how to pad them (`truncation`, `padding`)",
    "supported",
    "documents are neither cut nor filled up",
)
def test_a_tokenizer_that_was_saved_to_cut_and_to_pad_does_neither(tmp_path):
    file = write_jsonl(tmp_path / "text.jsonl", list(records(60)))
    plain = make(file, tmp_path / "plain")
    shutil.copytree(tmp_path / "plain" / "tokenizer", tmp_path / "used")
    used = Tokenizer.from_file(str(tmp_path / "used" / "tokenizer.json"))
    used.enable_truncation(8)
    used.enable_padding(length=16)
    used.save(str(tmp_path / "used" / "tokenizer.json"))
    corpus = make(file, tmp_path / "corpus", tokenizer=str(tmp_path / "used"))
    for split in SPLITS:
        assert np.array_equal(getattr(corpus, split).tokens, getattr(plain, split).tokens)


def test_the_tokenizer_learns_from_training_documents_only(tmp_path):
    rows = list(records(300))
    for row in rows:
        if hash_of(row["id"]) % 100 < 20:
            row["text"] += " zzqqzz" * 50
    corpus = make(write_jsonl(tmp_path / "docs.jsonl", rows), tmp_path / "corpus", vocab_size=340)
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
    assert made[0].tokenizer_sha256 == made[1].tokenizer_sha256
    assert np.array_equal(made[0].train.tokens, made[1].train.tokens)


def test_a_vocabulary_that_the_text_does_not_have_is_refused(tmp_path):
    rows = [{"id": number, "text": "tea cup"} for number in range(100)]
    source = write_jsonl(tmp_path / "docs.jsonl", rows)
    with pytest.raises(ValueError, match="data.vocab_size must be at most (\\d+) for this text, got 300") as raised:
        make(source, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]
    most = int(str(raised.value).split("at most ")[1].split()[0])
    assert make(source, tmp_path / "corpus", vocab_size=most).vocab_size == most


def test_a_vocabulary_beyond_all_bytes_is_refused_and_does_not_end_the_process(tmp_path):
    source = write_jsonl(tmp_path / "docs.jsonl", records(400))
    with pytest.raises(ValueError, match="data.vocab_size must be at most (\\d+) for this text, got 2147483648"):
        make(source, tmp_path / "corpus", vocab_size=1 << 31)
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_full_when_the_tokenizer_is_written_is_an_error_of_the_system(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as raised:
        save_tokenizer(tokenizer, tmp_path)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_tokens_are_as_narrow_as_the_vocabulary_allows(corpus):
    assert corpus.train.tokens.dtype == np.uint16
    assert isinstance(corpus.train.tokens, np.memmap)
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_wide_tokens(source, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "token_dtype", lambda vocab_size: np.dtype("<u4"))
    wide = make(source, tmp_path / "wide")
    assert wide.train.tokens.dtype == np.uint32
    for name in SPLITS:
        assert np.array_equal(getattr(wide, name).tokens, getattr(corpus, name).tokens)


def test_progress_is_shown_when_asked_for(source, tmp_path, capfd):
    prepare(config(source), tmp_path / "corpus", progress=True)
    shown = capfd.readouterr()
    assert "encoding: 100%" in shown.err
    assert "B/s" in shown.err
    assert shown.out == ""
    make(source, tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")


def test_a_split_without_documents_is_refused_before_tokenising(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "train_tokenizer", lambda *_: pytest.fail("tokenised"))
    source = write_jsonl(tmp_path / "docs.jsonl", records(3))
    message = r"none of the 3 documents falls into the .* split with data.holdout_percent 10"
    with pytest.raises(ValueError, match=message):
        make(source, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


# Reuse, and folders that are left alone


def test_a_finished_folder_is_reused(source, tmp_path, monkeypatch):
    first = make(source, tmp_path / "corpus")
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(source).read_bytes())
    monkeypatch.setattr(prepare_module, "train_tokenizer", lambda *_: pytest.fail("tokenised again"))
    again = make(str(moved), tmp_path / "corpus", weights=(2.0,))
    assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before


def test_sources_with_equal_stamps_are_not_hashed_again(source, corpus, monkeypatch):
    monkeypatch.setattr("memlayers.lm.data.sources.JsonLines.describe", lambda *_, **__: pytest.fail("hashed again"))
    assert make(source, corpus.folder).manifest == corpus.manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 310}, "vocab_size 300, asked for 310"),
        ({"holdout_percent": 11}, "holdout_percent 10, asked for 11"),
        ({"tokenizer_megabytes": 1.0}, "tokenizer_megabytes 16.0, asked for 1.0"),
        ({"skip_malformed": True}, "skip_malformed False, asked for True"),
    ],
)
def test_a_corpus_prepared_otherwise_is_left_alone(source, corpus, changes, message):
    before = contents(corpus.folder)
    with pytest.raises(ValueError, match=message):
        make(source, corpus.folder, **changes)
    assert contents(corpus.folder) == before


def test_changed_sources_are_noticed(source, corpus, tmp_path):
    other = write_jsonl(tmp_path / "docs.jsonl", list(records(401)))
    with pytest.raises(ValueError, match="sources with other contents"):
        make(other, corpus.folder)
    with pytest.raises(ValueError, match="sources with other contents"):
        prepare(config(source, other), corpus.folder, progress=False)


def test_a_finished_corpus_does_not_need_its_sources(tmp_path):
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", records(200)) for name in "ab"]
    first = prepare(config(*sources), tmp_path / "corpus", progress=False)
    Path(sources[0]).unlink()
    assert prepare(config(*sources), tmp_path / "corpus", progress=False).manifest == first.manifest
    with pytest.raises(ValueError, match="vocab_size 300, asked for 310"):
        prepare(config(*sources, vocab_size=310), tmp_path / "corpus", progress=False)
    with pytest.raises(ValueError, match="no such file.*c.jsonl"):
        prepare(config(str(tmp_path / "c.jsonl"), sources[1]), tmp_path / "corpus", progress=False)
    with pytest.raises(ValueError, match="sources with other contents"):
        prepare(config(sources[0]), tmp_path / "corpus", progress=False)
    write_jsonl(tmp_path / "b.jsonl", records(199))
    with pytest.raises(ValueError, match="sources with other contents"):
        prepare(config(*sources), tmp_path / "corpus", progress=False)


@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json"])
def test_a_folder_with_something_else_is_left_alone(source, tmp_path, monkeypatch, name):
    monkeypatch.setattr(prepare_module, "train_tokenizer", lambda *_: pytest.fail("tokenised for nothing"))
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


def test_missing_sources_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        make(str(tmp_path / "docs.jsonl"), tmp_path / "a" / "corpus")
    assert list(tmp_path.iterdir()) == []


# What no text of words has


@pytest.mark.parametrize(
    ("text", "longest", "pieces"),
    [
        ("", 3, [""]),
        ("ab cd", 3, ["ab cd"]),
        ("abc", 3, ["abc"]),
        ("abcd", 3, ["abc", "d"]),
        ("ab abcdefgh ij", 3, ["ab abc", "def", "gh ij"]),
        ("a      b", 3, ["a   ", "   ", "b"]),
        ("ab1-c", 3, ["ab1", "-c"]),
    ],
)
def test_a_text_is_cut_where_a_run_is_too_long(text, longest, pieces):
    assert cut_runs(text, longest) == pieces


@pytest.mark.promise(
    "Command line and files",
    "`memlayers prepare` on records with runs of hundreds of thousands of letters (DNA, base64)",
    "supported",
    "such runs are cut for the tokenizer's sample, and encoded in pieces",
)
def test_one_record_of_dna_is_as_quick_as_text(tmp_path, monkeypatch):
    given = []  # to the tokenizer, whose time grows with the square of a word's length

    def cut(text, longest):
        pieces = cut_runs(text, longest)
        given.extend(pieces)
        return pieces

    monkeypatch.setattr(tokenize_module, "cut_runs", cut)
    draw = random.Random(0)
    dna = "".join(draw.choices("ACGT", k=100_000))
    rows = [{"id": number, "text": f"text {number}"} for number in range(200)] + [{"id": "dna", "text": dna}]
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(sources=(str(source),), vocab_size=280, holdout_percent=10)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, "LONGEST_RUN", 1 << 20)
        corpus = prepare(config, tmp_path / "c", progress=False)
    assert max(map(len, given)) == 1024
    tokenizer = corpus.tokenizer()
    texts = [tokenizer.decode(part) for part in np.split(corpus.train.tokens, corpus.train.documents["offset"][1:])]
    assert f"<|endoftext|>{dna}" in texts


def test_a_long_text_of_words_has_the_same_tokens_in_pieces(monkeypatch):
    draw = random.Random(0)
    words = ["tea", "cup", "it's", "12", "--", "\n", "  ", "é", "x_y"]
    text = " ".join(draw.choices(words, k=4000))
    tokenizer = train_tokenizer([text], 300)
    (whole,) = encode_texts(tokenizer, [text])
    monkeypatch.setattr(tokenize_module, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tokenize_module, "PIECES_CHARACTERS", 200)
    assert len(list(tokenize_module._pieces(text))) > 100
    assert encode_texts(tokenizer, ["a", text, "", "b"])[1] == whole
    assert [len(tokens) for tokens in encode_texts(tokenizer, ["a", "", "b"])] == [1, 0, 1]


def test_a_run_that_is_too_long_to_be_encoded_at_once_comes_back(monkeypatch):
    monkeypatch.setattr(tokenize_module, "LONGEST_RUN", 100)
    tokenizer = train_tokenizer(["ACGT" * 100], 300)
    for text in ("ACGT" * 1000, " " * 1000, "word " * 10 + "TTAG" * 300):
        (tokens,) = encode_texts(tokenizer, [text])
        assert tokenizer.decode(tokens) == text


def copies(tmp_path, **changes):
    """A corpus in which each of 50 texts stands under four ids."""
    rows = [{"id": f"{number}-{copy}", "text": f"text {number}"} for number in range(50) for copy in range(4)]
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(sources=(str(source),), vocab_size=257, holdout_percent=20, **changes)
    return prepare(config, tmp_path / "corpus", progress=False)


@pytest.mark.promise(
    "Command line and files",
    "copies of a document under other ids, which land on both sides of the split",
    "supported",
    "they are counted and said; `--data.id_field ''` has the texts decide, and copies stay together",
)
def test_copies_under_other_ids_are_counted_and_said(tmp_path, capsys):
    corpus = copies(tmp_path)
    tokenizer = corpus.tokenizer()

    def texts(split):
        return [tokenizer.decode(part) for part in np.split(split.tokens, split.documents["offset"][1:])]

    trained = set(texts(corpus.train))
    count = sum(text in trained for split in (corpus.validation, corpus.test) for text in texts(split))
    assert count > 10
    assert corpus.manifest["copied_documents"] == count
    said = f"{count} held-out documents have the text of a training document with another id: data.id_field '' has"
    assert said in capsys.readouterr().err


def test_without_an_id_copies_stay_together(tmp_path, capsys):
    assert copies(tmp_path, id_field="").manifest["copied_documents"] == 0
    assert capsys.readouterr().err == ""


def test_copies_are_estimated_where_there_are_too_many_texts(monkeypatch):
    monkeypatch.setattr(survey_module, "MOST_HASHES", 1000)
    found = survey_module._Copies()
    for number in range(20_000):
        for split in ("train", "validation") if number % 2 else ("train",):
            found.add(survey_module.Measured(str(number), split, 0, 1, b""))
    assert len(found._counts) <= 1000
    assert found.held_out() == pytest.approx(10_000, rel=0.2)


@pytest.mark.parametrize(
    ("text", "strange"),
    [
        ("text\twith\nlines\r\n\f and é 三 \x1b[0m" + "x" * 100, False),
        ("a zero\0", True),
        ("\x01\x02\x03 and so on", True),
        ("\ufffd\ufffd\ufffd", True),
        ("one \ufffd in a long text" * 10 + "x" * 1000, False),
        ("", False),
    ],
)
def test_what_is_hardly_a_text_is_told_from_one(text, strange):
    assert survey_module.is_strange(text) is strange


@pytest.mark.promise(
    "Command line and files",
    "records that are no text (zero bytes, what a flipped bit left)",
    "supported",
    "they are counted and said",
)
def test_documents_that_are_hardly_text_are_counted_and_said(tmp_path, capsys):
    rows = [{"id": number, "text": f"text {number}" if number % 50 else "a\0b"} for number in range(100)]
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(sources=(str(source),), vocab_size=257, holdout_percent=20)
    corpus = prepare(config, tmp_path / "c", progress=False)
    assert corpus.manifest["strange_documents"] == 2
    assert "2 documents have zero bytes or many unreadable characters: are they text?" in capsys.readouterr().err
