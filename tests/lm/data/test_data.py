import json
import random
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from memlayers.files import file_sha256, read_sealed, write_sealed
from memlayers.lm.data import DOCUMENT, SPLITS, DataConfig, Shard, Split, Windows, encode, open_corpus, prepare
from memlayers.lm.data import corpus as corpus_module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of two sources with several shards each, the first two of which have as many tokens."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        texts = ["".join(generator.choice(list("abcdefgh"), size=40)) for _ in range(200)]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"id": f"{name}{n}", "text": text}) + "\n" for n, text in enumerate(texts))
        )
    config = DataConfig(sources=(str(folder / "a.jsonl"), str(folder / "b.jsonl")), vocab_size=257, holdout_percent=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "SHARD_TOKENS", 41 * 60)  # every document has 40 tokens and its mark
        return prepare(config, folder / "corpus", progress=False)


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 256}, "data.vocab_size must be an integer from 257 .* got 256"),
        ({"vocab_size": 300.0}, "data.vocab_size"),
        ({"holdout_percent": 0}, "data.holdout_percent must be an integer from 1 to 49"),
        ({"holdout_percent": 50}, "data.holdout_percent"),
        ({"tokenizer_megabytes": 0}, "data.tokenizer_megabytes must be a finite number above 0"),
        ({"tokenizer_megabytes": float("inf")}, "data.tokenizer_megabytes"),
        ({"sources": "docs.jsonl"}, "data.sources must be a list"),
        ({"text_field": ""}, "data.text_field must be the name of a field"),
        ({"id_field": 3}, "data.id_field"),
        ({"skip_malformed": "no"}, "data.skip_malformed must be True or False"),
        ({"sources": ("a", "b"), "weights": (1.0,)}, r"data.weights .* each of the 2 sources, got \[1.0\]"),
        ({"weights": (1.0,)}, "data.weights .* each of the 0 sources"),
        ({"sources": ("a",), "weights": (0,)}, "data.weights must be a finite number above 0, got 0"),
        ({"sources": ("a",), "weights": (10**400,)}, "data.weights must be a finite number above 0, got 1000"),
        ({"tokenizer_megabytes": 10**400}, "data.tokenizer_megabytes must be a finite number above 0, got 1000"),
        ({"vocab_size": 10**400}, "data.vocab_size must be an integer from 257 to 2147483648, got 1000"),
        ({"sources": ("a",), "weights": (float("nan"),)}, "data.weights"),
        ({"sources": ("a",), "weights": (True,)}, "data.weights"),
        ({"sources": ("a",), "weights": 1.0}, "data.weights"),
    ],
)
def test_settings_are_checked_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


def test_the_default_share_is_that_of_the_news_corpus():
    assert DataConfig(sources=("news.jsonl",)).resolved_holdout_percent() == 1
    assert DataConfig().resolved_holdout_percent() == 5
    assert DataConfig(holdout_percent=2).resolved_holdout_percent() == 2


# Splits and their prefixes


def small_documents():
    documents = np.zeros(4, DOCUMENT)
    documents["offset"], documents["words"], documents["bytes"] = [0, 3, 4, 9], [1, 2, 3, 4], [10, 20, 30, 40]
    return documents


def small_split():
    return Split(np.arange(11, dtype=np.uint16), small_documents())


def same_split_in_shards():
    whole = small_split()
    documents = small_documents()
    documents["offset"][2:] -= 4
    return Split.of([Shard(whole.tokens[:4], documents[:2], 0), Shard(whole.tokens[4:], documents[2:], 1)])


@pytest.mark.parametrize("make", [small_split, same_split_in_shards])
@pytest.mark.parametrize(
    ("max_tokens", "documents", "tokens"),
    [(1, 1, 3), (3, 1, 3), (4, 2, 4), (8, 2, 4), (9, 3, 9), (11, 4, 11), (99, 4, 11)],
)
def test_prefix_is_of_whole_documents(make, max_tokens, documents, tokens):
    prefix = make().prefix(max_tokens)
    assert (prefix.num_documents, prefix.num_tokens) == (documents, tokens)
    assert prefix.num_words == sum(range(1, documents + 1))
    assert prefix.num_bytes == 10 * prefix.num_words
    assert prefix.tokens.tolist() == list(range(tokens))
    assert prefix.documents.tolist() == small_split().documents[:documents].tolist()


def test_prefix_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        small_split().prefix(0)


def test_tokens_of_one_shard_are_not_copied(corpus):
    assert isinstance(corpus.validation.tokens, np.memmap)
    assert np.shares_memory(corpus.validation.tokens, corpus.validation.shards[0].tokens)
    assert np.shares_memory(corpus.validation.prefix(100).tokens, corpus.validation.tokens)


def test_a_shard_is_of_one_source_and_documents_begin_with_end_of_text(corpus):
    assert [shard.source for shard in corpus.train.shards] == [0, 0, 0, 1, 1, 1]
    assert corpus.train.num_words == corpus.train.num_documents
    for split in (corpus.train, corpus.validation, corpus.test):
        assert np.flatnonzero(split.tokens == corpus.eot_id).tolist() == split.documents["offset"].tolist()
        for shard in split.shards:
            assert np.flatnonzero(shard.tokens == corpus.eot_id).tolist() == shard.documents["offset"].tolist()


# What is on disk is verified


def changed_copy(corpus, tmp_path):
    return shutil.copytree(corpus.folder, tmp_path / "corpus")


def files_of(corpus):
    return sorted(path.relative_to(corpus.folder).as_posix() for path in corpus.folder.rglob("*") if path.is_file())


def test_every_file_of_the_folder_is_in_the_manifest(corpus):
    hashes = corpus_module.described_files(corpus.manifest)
    assert files_of(corpus) == sorted([*hashes, "manifest.json"])
    assert len(hashes) == 2 + 2 * (6 + 2)


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_single_changed_bit_is_noticed_in_every_file(corpus, tmp_path):
    folder = changed_copy(corpus, tmp_path)
    for name in files_of(corpus):
        for place in (0, (folder / name).stat().st_size // 2, -1):
            flip(folder / name, place)
            with pytest.raises(ValueError, match=name):
                open_corpus(folder)
            flip(folder / name, place)
    assert open_corpus(folder).manifest == corpus.manifest


def test_a_truncated_or_missing_file_is_named(corpus, tmp_path):
    folder = changed_copy(corpus, tmp_path)
    for name in files_of(corpus):
        whole = (folder / name).read_bytes()
        for left in (whole[:-1], whole[: len(whole) // 2], b"", None):
            (folder / name).unlink()
            if left is not None:
                (folder / name).write_bytes(left)
            with pytest.raises(ValueError, match=name):
                open_corpus(folder)
            (folder / name).write_bytes(whole)
    assert open_corpus(folder).manifest == corpus.manifest


@pytest.mark.parametrize("suffix", ["tokens", "documents.npy"])
def test_exchanged_shards_are_noticed(corpus, tmp_path, suffix):
    folder = changed_copy(corpus, tmp_path)
    # Documents of equal length have equal offsets: only the tokens of two full shards differ.
    first, second = (0, 1) if suffix == "tokens" else (0, 2)
    one, other = (folder / f"train-{number:05}.{suffix}" for number in (first, second))
    if suffix == "tokens":
        assert one.stat().st_size == other.stat().st_size
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    with pytest.raises(ValueError, match=f"train-00000.{suffix} is damaged"):
        open_corpus(folder)


def test_a_folder_without_a_corpus_and_other_formats_are_told_apart(corpus, tmp_path):
    with pytest.raises(ValueError, match="holds no prepared corpus"):
        open_corpus(tmp_path)
    for content in ("[]", "{}"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="holds no prepared corpus"):
            open_corpus(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "asked": {}}')
    with pytest.raises(ValueError, match="corpus of format 1, this version reads format 2: prepare it again"):
        open_corpus(tmp_path)
    write_sealed(tmp_path / "manifest.json", {"format": 99})
    with pytest.raises(ValueError, match="format 99, this version reads format 2"):
        open_corpus(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        open_corpus(tmp_path)


def test_verifying_shows_progress_for_a_large_corpus_only(corpus, monkeypatch, capfd):
    open_corpus(corpus.folder, progress=True)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(corpus_module, "SHOWN_BYTES", 1000)
    open_corpus(corpus.folder, progress=True)
    assert "verifying: 100%" in capfd.readouterr().err
    open_corpus(corpus.folder)
    assert capfd.readouterr() == ("", "")


# The tokenizer


def test_the_tokenizer_is_copied_as_transformers_would_save_it(corpus, tmp_path):
    corpus.save_tokenizer(tmp_path / "copied")
    corpus.tokenizer().save_pretrained(tmp_path / "saved")
    copied, saved = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("copied", "saved")
    )
    assert copied == saved
    assert set(saved) == {"tokenizer.json", "tokenizer_config.json"}
    assert corpus.tokenizer_sha256 == file_sha256(tmp_path / "copied" / "tokenizer.json")


def test_ready_token_files_need_no_library_for_text(corpus):
    script = f"""
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("tokenizers", "transformers", "tqdm", "datasets", "pyarrow", "zstandard"):
                    raise ImportError(name)

        sys.meta_path.insert(0, Block())
        from memlayers.lm.data import DataConfig, Windows, open_corpus, prepare
        corpus = open_corpus({str(corpus.folder)!r})
        print(len(Windows(corpus.train, 16)), corpus.vocab_size, corpus.validation.prefix(100).num_words)
        corpus.save_tokenizer("copied")
        sources = {tuple(entry["name"] for entry in corpus.manifest["asked"]["sources"])!r}
        config = DataConfig(sources=sources, vocab_size=257, holdout_percent=10)
        print(prepare(config, {str(corpus.folder)!r}).vocab_size)
        try:
            corpus.tokenizer()
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        cwd=corpus.folder.parent,
    )
    windows, words = len(Windows(corpus.train, 16)), corpus.validation.prefix(100).num_words
    assert done.stdout == f"{windows} {corpus.vocab_size} {words}\n257\ntokenizers\n"


def test_the_manifest_counts_what_is_there(corpus):
    manifest = read_sealed(corpus.folder / "manifest.json")
    for name in SPLITS:
        split, counts = getattr(corpus, name), manifest["splits"][name]
        expected = {
            "documents": split.num_documents,
            "tokens": split.num_tokens,
            "words": split.num_words,
            "bytes": split.num_bytes,
        }
        assert {key: counts[key] for key in expected} == expected
        for key, value in expected.items():
            assert sum(shard[key] for shard in counts["shards"]) == value


# A corpus from somebody else. The seal is no secret.


def reseal(corpus, folder, change):
    """A copy of the corpus whose manifest was changed and sealed again."""
    shutil.copytree(corpus.folder, folder)
    manifest = read_sealed(folder / "manifest.json")
    change(manifest)
    write_sealed(folder / "manifest.json", manifest)
    return folder


@pytest.mark.promise(
    "Command line and files",
    "a corpus whose manifest names files outside of its folder",
    "refused",
    "nothing is written; every name that is read from a file stays inside its folder",
)
@pytest.mark.parametrize("name", ["../../../x.py", "/x.py", "../x.json", "c:x.json", "x.py", "config.json", "a/b.json"])
def test_a_manifest_that_names_a_tokenizer_s_file_elsewhere_writes_nothing(corpus, tmp_path, name):
    (tmp_path / "x.py").write_text("mine")
    digest = file_sha256(tmp_path / "x.py")
    folder = reseal(corpus, tmp_path / "a" / "b" / "corpus", lambda m: m["tokenizer"]["files"].update({name: digest}))
    with pytest.raises(ValueError, match="manifest.json does not describe a corpus: .* is no file of a tokenizer"):
        open_corpus(folder)
    assert (tmp_path / "x.py").read_text() == "mine"


def test_a_tokenizer_that_is_a_link_to_elsewhere_is_refused(corpus, tmp_path):
    folder = shutil.copytree(corpus.folder, tmp_path / "corpus")
    shutil.move(folder / "tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer").symlink_to("../tokenizer")
    with pytest.raises(ValueError, match="is a link to outside of it"):
        open_corpus(folder)


def test_a_link_in_the_place_of_a_tokenizer_s_file_is_replaced_and_not_followed(corpus, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "mine")
    corpus.save_tokenizer(tmp_path / "model")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "model" / "tokenizer.json").is_symlink()


def test_whatever_a_manifest_says_it_is_refused_in_a_sentence_or_right(corpus, tmp_path):
    folder = shutil.copytree(corpus.folder, tmp_path / "corpus")
    whole = read_sealed(folder / "manifest.json")
    draw = random.Random(0)
    wrong = [None, 3, -1, 1 << 70, "", "../x", "/x", [], ["x"], {}, {"x": 3}, 0.5, True, "\0"]
    refused = 0
    for _ in range(100):
        manifest = json.loads(json.dumps(whole))
        place, key = draw.choice(list(places(manifest)))
        if draw.random() < 0.3:
            del place[key]
        else:
            place[key] = draw.choice(wrong)
        write_sealed(folder / "manifest.json", manifest)
        try:
            opened = open_corpus(folder)
        except ValueError:
            refused += 1
        else:
            shards = [shard for split in SPLITS for shard in getattr(opened, split).shards]
            assert all(len(shard.tokens) == shard.num_tokens for shard in shards)
    assert refused > 50


def places(content):
    """Every entry of what JSON holds, but of what was asked for."""
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list) and key not in ("asked", "versions"):
            yield from places(content[key])
