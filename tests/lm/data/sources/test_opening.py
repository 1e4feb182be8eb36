import hashlib
import os
import sys

import pytest

from memlayers.lm.data.sources import HuggingFace, JsonLines, Parquet, TextFile, open_sources


def names(sources):
    return [source.describe()["name"] for source in sources]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", TextFile),
        ("a.py", TextFile),
        ("a", TextFile),
        ("a.gz", TextFile),
        ("a.md.xz", TextFile),
        ("a.jsonl", JsonLines),
        ("a.jsonl.gz", JsonLines),
        ("A.JSONL.ZST", JsonLines),
        ("a.b.parquet", Parquet),
        ("hf:a.txt", HuggingFace),
    ],
)
def test_the_suffix_says_what_a_file_is(tmp_path, monkeypatch, opened, name, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    (source,) = opened(name)
    assert type(source) is kind
    assert source.name == name


def test_each_entry_has_its_own_list_and_the_fields_that_were_asked_for(written):
    paths = [str(written(name, b"x")) for name in ("b.jsonl", "a.txt", "c.parquet")]
    groups = open_sources([*paths, "hf:a"], text_field="body", id_field="url")
    assert [[source.name for source in group] for group in groups] == [[path] for path in [*paths, "hf:a"]]
    for (source,) in (groups[0], groups[2], groups[3]):
        assert (source.text_field, source.id_field) == ("body", "url")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "sources: no such file or folder: .*missing.txt"),
        ("hollow", "sources: no file of .parquet, .txt, .*.jsonl.zst, .*.ndjson.zst in the folder .*hollow"),
        ("empty.txt", "empty.txt is empty"),
        ("empty.txt.zst", "empty.txt.zst is empty"),
        ("empty.parquet", "empty.parquet is empty"),
        ("docs.json", "docs.json is neither plain text nor JSON lines .*name it .jsonl"),
        ("docs.json.xz", "docs.json.xz is neither"),
        ("docs.json.gz", "docs.json.gz is neither"),
        ("docs.txt.bz2", "docs.txt.bz2 is neither"),
        ("docs.zip", "docs.zip is neither"),
        ("docs.parquet.gz", "docs.parquet.gz: Parquet is compressed inside"),
        ("*.none", r"sources: no file matches .*\*.none"),
        ("hollow*", r"sources: no file matches .*hollow\*"),
        ("docs.j*n", "docs.json is neither"),
        ("empty.*zst", "empty.txt.zst is empty"),
        ("pipe", "pipe is neither a file nor a folder; it has to be read more than once"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, opened, name, message):
    (tmp_path / "hollow" / "below").mkdir(parents=True)
    (tmp_path / "hollow" / "below" / "notes.md").write_bytes(b"x")
    (tmp_path / "hollow" / ".hidden.txt").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    for empty in ("empty.txt", "empty.txt.zst", "empty.parquet"):
        (tmp_path / empty).touch()
    for other in ("docs.json", "docs.json.xz", "docs.json.gz", "docs.txt.bz2", "docs.zip", "docs.parquet.gz"):
        (tmp_path / other).write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / name)


@pytest.mark.parametrize("entry", ["", " "])
def test_an_empty_path_is_not_the_working_folder(written, tmp_path, monkeypatch, entry):
    written("a.txt", b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"sources: {entry!r} is not the path of a file or folder"):
        open_sources([entry], text_field="text", id_field="id")


def test_a_folder_is_its_files_of_known_suffixes_sorted_by_their_paths(written, tmp_path, opened):
    kept = [
        "a.jsonl.gz",
        "a/z.txt",
        "a0.TXT",
        "b.parquet",
        "b/c/d.txt.zst",
        "b/e.jsonl",
        "b.txt.xz",
        "z[1]/x.jsonl.zst",
    ]
    dropped = [".a.txt", "b/.git/a.txt", "b/notes.md", "b/run.py", "b/x.json", "b/x.txt.bz2", "README", "txt"]
    for name in [*dropped, *reversed(kept)]:
        written(f"data/{name}", b"x")
    sources = opened(tmp_path / "data")
    assert names(sources) == sorted(kept)
    assert [source.name for source in sources] == [str(tmp_path / "data" / name) for name in sorted(kept)]
    assert names(opened(tmp_path / "data" / "z[1]")) == ["x.jsonl.zst"]


def test_links_are_followed_but_in_no_circle(written, tmp_path, opened):
    written("elsewhere/a.txt", b"x")
    written("data/b.txt", b"y")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert names(opened(tmp_path / "data")) == ["b.txt", "more/a.txt"]
    (tmp_path / "data" / "twice").symlink_to(tmp_path / "elsewhere")
    assert names(opened(tmp_path / "data")) == ["b.txt", "more/a.txt"]
    (tmp_path / "data" / "z").mkdir()
    written("data/z/c.txt", b"z")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "data" / "z")  # a folder goes by its own name
    assert names(opened(tmp_path / "data")) == ["b.txt", "more/a.txt", "z/c.txt"]


@pytest.mark.promise(
    "Command line and files",
    "folders of links that link to each other",
    "supported",
    "each folder is read once",
)
@pytest.mark.parametrize("entry", ["all", "all/**/*.txt", "all/0", "all/0/**/?.txt", "elsewhere"])
def test_folders_that_link_to_each_other_are_read_once(written, tmp_path, opened, entry):
    for number in range(12):
        written(f"all/{number}/{'abcdefghijkl'[number]}.txt", b"x")
        for other in range(12):
            (tmp_path / "all" / str(number) / f"to-{other}").symlink_to(tmp_path / "all" / str(other))
    (tmp_path / "elsewhere").symlink_to(tmp_path / "all")
    found = opened(tmp_path / entry)
    assert sorted(name.rpartition("/")[2] for name in names(found)) == [f"{letter}.txt" for letter in "abcdefghijkl"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/*.txt", ["a.txt", "x/b.txt"]),
        ("**/.*.txt", [".c.txt", "x/.d.txt"]),
        (".h/**/*.txt", ["e.txt"]),
        ("**/.h/*.txt", [".h/e.txt"]),
        ("**", ["a.txt", "x/b.txt"]),
        ("gone/**/*.txt", None),
    ],
)
def test_a_glob_of_any_depth_takes_hidden_files_where_it_names_them(written, tmp_path, opened, pattern, found):
    for name in ("a.txt", "x/b.txt", ".c.txt", "x/.d.txt", ".h/e.txt"):
        written(f"data/{name}", b"x")
    if found is None:
        with pytest.raises(ValueError, match="no file matches"):
            opened(tmp_path / "data" / pattern)
    else:
        assert names(opened(tmp_path / "data" / pattern)) == found


@pytest.mark.parametrize("entry", ["data", "data/*"])
def test_a_link_that_leads_nowhere_is_named(written, tmp_path, opened, entry):
    written("data/a.txt", b"x")
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="sources: no such file or folder: .*b.txt"):
        opened(tmp_path / entry)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("data/*.txt", ["a.txt", "b.txt"]),
        ("./data/[b-z].txt", ["b.txt"]),
        ("data/?.py", ["c.py"]),
        ("data/**/*.txt", ["a.txt", "b.txt", "x/a.txt", "x/y/d.txt"]),
        ("data/**/**/a.txt", ["a.txt", "x/a.txt"]),
        ("data/*/a.txt", ["x/a.txt"]),
        ("data/x/**", ["a.txt", "y/d.txt"]),
        ("dat*/a.txt", ["data/a.txt"]),
    ],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_glob_is_the_files_that_match_sorted_by_their_paths(
    written, tmp_path, monkeypatch, opened, pattern, found, absolute
):
    for name in ("x/y/d.txt", "x/a.txt", "c.py", "b.txt", "a.txt", ".a.txt"):
        written(f"data/{name}", b"x")
    (tmp_path / "data" / "folder.txt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert names(opened(tmp_path / pattern if absolute else pattern)) == found


def test_a_file_whose_name_looks_like_a_glob_is_a_file(written, opened):
    written("a1.txt", b"x")
    assert names(opened(written("a[1].txt", b"y"))) == ["a[1].txt"]


@pytest.mark.parametrize(
    "entries", [("a.txt", "a.txt"), ("a.txt", "./b/../a.txt"), ("*.txt", "a.txt"), (".", "b"), ("hf:x", "hf:x::train")]
)
def test_what_is_given_twice_is_refused(written, tmp_path, monkeypatch, opened, entries):
    written("a.txt", b"x")
    written("b/c.txt", b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="sources: .* is given twice"):
        opened(*entries)


def test_a_linked_file_beside_its_target_is_given_twice(written, tmp_path, opened):
    (tmp_path / "b.txt").symlink_to(written("a.txt", b"x"))
    with pytest.raises(ValueError, match="b.txt is given twice"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("package", "name"),
    [("zstandard", "a.txt.zst"), ("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("datasets", "hf:a")],
)
def test_a_package_that_is_not_installed_is_named_with_the_way_to_it(tmp_path, monkeypatch, opened, package, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"sources: reading {name} needs {package}: pip install 'memlayers\[data\]'"):
        opened("b.txt", name)
    assert len(opened("b.txt")) == 1


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.txt", "docs.jsonl.gz", "docs.parquet"])
def test_files_are_described_by_their_bytes(tmp_path, opened, name):
    content = b'{"text": "x"}'
    (tmp_path / name).write_bytes(content)
    (source,) = opened(tmp_path / name)
    assert source.describe() == {
        "format": {"txt": "text", "gz": "jsonl"}.get(name.split(".")[-1], name.split(".")[-1]),
        "name": name,
        "bytes": 13,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_a_stamp_changes_with_the_file_its_size_and_its_time(written, tmp_path, monkeypatch, opened):
    path = written("a/docs.txt", b"one")
    os.utime(path, ns=(5, 5))
    (source,) = opened(path)
    stamp = source.stamp()
    assert stamp == {"name": str(path), "bytes": 3, "mtime_ns": 5}
    monkeypatch.chdir(tmp_path)
    assert opened("a/docs.txt")[0].stamp() == opened("a")[0].stamp() == stamp
    other = written("b/docs.txt", b"two")
    os.utime(other, ns=(5, 5))
    assert opened(other)[0].stamp() != stamp
    os.utime(path, ns=(5, 6))
    assert source.stamp() != stamp
    path.write_bytes(b"longer")
    os.utime(path, ns=(5, 5))
    assert source.stamp() != stamp


def test_nothing_heavy_is_imported_before_it_is_needed():
    import subprocess

    code = (
        "import sys, memlayers.lm.data.sources\n"
        "print({'pyarrow', 'datasets', 'zstandard', 'transformers'}.intersection(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "set()\n", result.stderr
