import pytest

from memlayers.lm.data.sources import Parquet
from memlayers.lm.data.sources import parquet as module

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def table(tmp_path):
    """`table(columns, ...)`: a Parquet file of these columns."""

    def write(columns, name="docs.parquet", **options):
        pq.write_table(
            columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), tmp_path / name, **options
        )
        return tmp_path / name

    return write


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_a_row_is_a_document(table, read, kind):
    texts = pyarrow.array(["one", "zwei\n", "三", ""], kind)
    path = table({"id": [7, None, -1, 2**60], "other": [[1]] * 4, "text": texts})
    assert read(path) == [("7", "one"), ("zwei\n", "zwei\n"), ("-1", "三"), (str(2**60), "")]
    path = table({"id": pyarrow.array(["a", "b", None, "d"], kind), "text": texts})
    assert [document.key for document in read(path)] == ["a", "b", "三", "d"]


@pytest.mark.promise(
    "Command line and files",
    "Parquet with columns of categories or of large or viewed strings, as pandas, polars and DuckDB write them",
    "supported",
    "they are read as strings",
)
@pytest.mark.parametrize(
    "form",
    [
        lambda texts: texts.dictionary_encode(),
        lambda texts: texts.cast(pyarrow.large_string()).dictionary_encode(),
        lambda texts: texts.cast(pyarrow.string_view()),
    ],
    ids=["categories", "large categories", "views"],
)
def test_strings_of_every_kind_are_documents(table, read, form):
    texts = pyarrow.array(["one", "zwei\n", "one", "", "longer than what a view holds itself"], pyarrow.string())
    path = table({"id": form(texts), "text": form(texts)})
    expected = ["one", "zwei\n", "one", "", "longer than what a view holds itself"]
    assert [document.text for document in read(path)] == expected
    assert [document.key for document in read(path)] == ["one", "zwei\n", "one", "", expected[-1]]
    numbers = pyarrow.array([7, 8, 7, 9, 7]).dictionary_encode()
    assert [document.key for document in read(table({"id": numbers, "text": texts}))] == ["7", "8", "7", "9", "7"]


def test_categories_of_other_things_are_named(table, read):
    path = table({"text": pyarrow.array([7, 8]).dictionary_encode()})
    with pytest.raises(ValueError, match=r"column 'text' \(text_field\) is .*int64.*, expected string"):
        read(path)


@pytest.mark.promise(
    "Command line and files",
    "a flipped bit in a page of a Parquet file that has checksums",
    "refused",
    "the file is named; write checksums with `write_page_checksum=True`",
)
def test_a_page_is_compared_with_its_checksum(table, read):
    texts = [f"text {number}" for number in range(1000)]
    options = {"compression": "none", "use_dictionary": False}
    path = table({"text": texts}, write_page_checksum=True, **options)
    assert len(read(path)) == 1000
    raw = path.read_bytes().replace(b"text 500", b"text 501")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="docs.parquet: not readable as Parquet: .*(CRC|checksum)"):
        read(path)


def test_without_an_id_the_text_decides(table, read):
    (document,) = read(table({"text": ["one"]}))
    assert document.key is document.text


def test_rows_keep_their_order_across_row_groups_and_batches(table, read, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)
    path = table({"text": [f"text {number}" for number in range(100)]}, row_group_size=13)
    assert [document.text for document in read(path)] == [f"text {number}" for number in range(100)]


def test_a_null_is_named_with_its_row_or_skipped(table, read, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)
    path = table({"text": ["one", "two", None, "four", None]}, row_group_size=3)
    with pytest.raises(ValueError, match=r"docs.parquet, row 3: field 'text' is NoneType, expected a string"):
        read(path)
    skipped = []
    assert [document.text for document in read(path, skip=skipped.append)] == ["one", "two", "four"]
    assert [message.split(":")[0][-5:] for message in skipped] == ["row 3", "row 5"]


def test_a_string_that_is_not_utf8_is_named_with_its_row_or_skipped(table, read):
    texts = pyarrow.array([b"one", b"\xff", b"three"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    path = table({"text": texts})
    with pytest.raises(ValueError, match=r"docs.parquet, row 2: a string is not UTF-8"):
        read(path)
    assert [document.text for document in read(path, skip=lambda message: None)] == ["one", "three"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "id": [1]}, r"no single column 'text' \(text_field\); it has 'body', 'id'"),
        ({"text": [1], "id": [1]}, r"column 'text' \(text_field\) is int64, expected string; it has 'text', 'id'"),
        ({"text": [b"x"]}, r"column 'text' \(text_field\) is binary, expected string"),
        ({"text": [["x"]]}, r"column 'text' \(text_field\) is list<.*, expected string"),
        ({"text": ["x"], "id": [0.5]}, r"column 'id' \(id_field\) is double, expected string or integer"),
        ({"text": ["x"], "id": [True]}, r"column 'id' \(id_field\) is bool, expected string or integer"),
    ],
)
def test_columns_that_cannot_be_used_are_named_and_never_skipped(table, read, columns, message):
    with pytest.raises(ValueError, match=f"docs.parquet: {message}"):
        read(table(columns), skip=lambda message: None)


def test_two_columns_of_one_name_are_refused(table, read):
    for names in (["text", "text", "id"], ["text", "id", "id"]):
        columns = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=names)
        with pytest.raises(ValueError, match=f"docs.parquet: no single column '{names[1]}'"):
            read(table(columns))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"plain text",
        lambda content: content[:-10],
        lambda content: b"PAR1" + b"x" * 1000 + content[1004:],
    ],
    ids=["not Parquet", "cut off", "damaged"],
)
def test_what_is_not_whole_parquet_is_named_and_never_skipped(table, read, spoil):
    path = table({"text": [f"text {number}" for number in range(1000)]})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="docs.parquet: not readable as Parquet: "):
        read(path, skip=lambda message: None)


@pytest.mark.parametrize(
    ("fault", "expected", "message"),
    [
        (OSError(5, "Error reading bytes from file. Detail: [errno 5]"), OSError, "Input/output error: .*docs.parquet"),
        (pyarrow.ArrowMemoryError("malloc of size 64 failed"), MemoryError, "malloc of size 64 failed"),
        (OSError("Corrupt snappy compressed data."), ValueError, "docs.parquet: not readable as Parquet: Corrupt"),
    ],
    ids=["disk", "memory", "damaged"],
)
def test_a_disk_that_fails_and_a_lack_of_memory_are_not_the_file_s_fault(
    table, read, monkeypatch, fault, expected, message
):
    def fail(*_, **__):
        raise fault

    path = table({"text": ["one"]})
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(expected, match=message) as raised:
        read(path, skip=lambda message: None)
    assert isinstance(raised.value, ValueError) == (expected is ValueError)


def test_a_field_that_is_both_text_and_id_is_read_once(table):
    path = table({"text": ["one"]})
    assert list(Parquet(path, id_field="text").documents()) == [("one", "one")]


def test_a_table_without_rows_has_no_documents(table, read):
    assert read(table({"text": pyarrow.array([], pyarrow.string())})) == []


def test_a_large_row_group_is_read_in_bounded_memory(table, opened):
    texts = [f"{number} " + "word " * 2000 for number in range(1600)]  # 16 MB
    path = table({"text": texts, "unused": texts}, compression="none", use_dictionary=False, write_batch_size=16)
    assert path.stat().st_size > 32_000_000
    (source,) = opened(path)
    before, most, size = pyarrow.total_allocated_bytes(), 0, 0
    for document in source.documents():
        most = max(most, pyarrow.total_allocated_bytes() - before)
        size += len(document.text)
    assert size >= 16_000_000
    assert 0 < most < 4_000_000  # a few pages and batches
