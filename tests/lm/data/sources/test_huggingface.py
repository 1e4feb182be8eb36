import logging
import os
import re
import warnings

import pytest

from memlayers.lm.data.sources import HuggingFace

pytest.importorskip("pyarrow")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    datasets = pytest.importorskip("datasets")
    import huggingface_hub


@pytest.fixture(autouse=True)
def _on_this_machine_only(monkeypatch, tmp_path):
    """No network, and no file outside of `tmp_path`. The environment was read when the packages were imported."""
    cache = tmp_path / "cache"
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(cache))
    for constants in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(cache))


@pytest.fixture
def folder(tmp_path):
    """Two splits of JSON lines."""
    folder = tmp_path / "news"
    folder.mkdir()
    for split, rows in {"train": '{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n', "test": '{"text": "c"}\n'}.items():
        (folder / f"{split}.jsonl").write_text(rows)
    return folder


def test_a_row_is_a_document(folder, read, tmp_path):
    assert read(f"hf:{folder}") == [("1", "a"), ("2", "b")]
    assert read(f"hf:{folder}::test") == [("c", "c")]
    assert read(f"hf:{folder}:default:train") == read(f"hf:{folder}")


def test_a_folder_of_parquet_is_read_by_its_columns(tmp_path, read):
    import pyarrow
    import pyarrow.parquet as pq

    (tmp_path / "wiki").mkdir()
    columns = {"text": ["one", "two"], "id": ["x", None], "score": [0.5, 1.0]}
    pq.write_table(pyarrow.table(columns), tmp_path / "wiki" / "train.parquet")
    assert read(f"hf:{tmp_path / 'wiki'}") == [("x", "one"), ("two", "two")]


def test_a_null_is_named_with_its_row_or_skipped(folder, read):
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=r"hf:.*news, row 2: field 'text' is NoneType"):
        read(f"hf:{folder}")
    skipped = []
    assert read(f"hf:{folder}", skip=skipped.append) == [("a", "a"), ("c", "c")]
    assert skipped == [f"hf:{folder}, row 2: field 'text' is NoneType, expected a string"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"body": "a", "id": 1}\n', r"hf:.*news: no single column 'text' \(text_field\); it has 'body', 'id'"),
        ('{"text": 1}\n', r"hf:.*news: column 'text' \(text_field\) is int64, expected string"),
        ('{"text": ["a"]}\n', r"hf:.*news: column 'text' \(text_field\) is .*, expected string"),
        ('{"text": \n', r"hf:.*news: not readable with `datasets`"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_named_and_never_skipped(folder, read, rows, message):
    (folder / "train.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=message):
        read(f"hf:{folder}", skip=lambda message: None)


def test_a_dataset_that_does_not_say_its_columns_is_told_by_its_rows(folder, read, monkeypatch):
    rows = [{"text": "a"}, {"body": "b"}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert stream.features is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: stream)
    skipped = []
    assert read("hf:somewhere", skip=skipped.append) == [("a", "a")]
    assert skipped == ["hf:somewhere, row 2: no field 'text' (text_field); it has 'body'"]


def test_a_fault_in_the_middle_of_the_stream_is_named(read, monkeypatch):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("the line is dead")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: stream)
    with pytest.raises(ValueError, match="hf:somewhere: not readable with `datasets` to its end: .*the line is dead"):
        read("hf:somewhere", skip=lambda message: None)


@pytest.mark.parametrize("entry", ["hf:nobody/nothing", "hf:{}:other", "hf:{}::validation", "hf:{}::train[:10]"])
def test_a_dataset_that_is_not_found_is_named(folder, read, entry):
    entry = entry.format(folder)
    with pytest.raises(ValueError, match=f"^{re.escape(entry)}: not readable with `datasets`: ") as raised:
        read(entry)
    assert raised.value.__cause__ is not None


def test_nothing_is_printed_and_what_was_set_is_set_again(folder, read, capfd, monkeypatch):
    loggers = [datasets.utils.logging, huggingface_hub.utils.logging]
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity(logging.INFO)
    during = []
    load = datasets.load_dataset

    def talkative(*names, **options):
        warnings.warn("do not do that", stacklevel=1)
        logging.getLogger("datasets.load").warning("beware")
        logging.getLogger("huggingface_hub.utils").warning("beware")
        list(datasets.utils.tqdm(range(3)))
        during.append([logger.get_verbosity() for logger in loggers])
        return load(*names, **options)

    monkeypatch.setattr(datasets, "load_dataset", talkative)
    assert len(read(f"hf:{folder}")) == 2
    assert capfd.readouterr() == ("", "")
    assert during == [[logging.ERROR] * 2]
    assert [logger.get_verbosity() for logger in loggers] == [logging.INFO] * 2
    assert not datasets.utils.are_progress_bars_disabled()
    for logger, verbosity in zip(loggers, before, strict=True):
        logger.set_verbosity(verbosity)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("hf:a/b", ("a/b", None, "train")),
        ("hf:a/b:en", ("a/b", "en", "train")),
        ("hf:a/b::test", ("a/b", None, "test")),
        ("hf:a/b:en:test", ("a/b", "en", "test")),
    ],
)
def test_the_parts_of_a_name(opened, entry, parts):
    (source,) = opened(entry)
    assert source == HuggingFace(*parts)
    assert source.name == entry
    assert source.stamp() is None
    assert source.describe() == dict(zip(("format", "name", "config", "split"), ("huggingface", *parts), strict=True))


def test_a_folder_may_have_colons_in_its_name(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("C:/data:new")
    assert opened("hf:C:/data:new:en") == [HuggingFace("C:/data:new", "en")]
    assert opened("hf:C:/data:new") == [HuggingFace("C:/data:new")]


@pytest.mark.parametrize("entry", ["hf:", "hf: ", "hf::en"])
def test_a_name_that_is_none_is_refused(opened, entry):
    with pytest.raises(ValueError, match=f"sources: {entry!r} is not hf:NAME, hf:NAME:CONFIG or"):
        opened(entry)
