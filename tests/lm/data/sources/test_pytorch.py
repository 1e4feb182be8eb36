import hashlib
from collections import Counter
from importlib.metadata import Distribution, PathDistribution, version

import pytest

from memlayers.files import read_sealed, write_sealed
from memlayers.lm.data import MANIFEST, DataConfig, open_corpus, prepare
from memlayers.lm.data.sources import PyTorchSources, open_sources, opening
from memlayers.lm.data.sources.near_copies import different_lines, first_copies
from memlayers.lm.data.survey import measured_documents


def module(name, lines=20):
    """A file of `lines` lines that no other file has."""
    return "".join(f"{name}_{number} = {number}\n\n" for number in range(lines))


def installed(folder, files, listed=None):
    """An installed package of these files; it lists all of them, or those that are `listed`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    info = folder / "torch-9.8.7+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.8.7+cpu\n")
    if listed is not None or files:
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in (files if listed is None else listed)))
    return PyTorchSources(PathDistribution(info))


def test_the_package_s_own_sources_without_what_is_generated_built_long_or_short(tmp_path):
    kept = {name: module(name[-4]) for name in ("torch/a.py", "torch/nn/b.py", "torch/x/version.py", "torchgen/c.py")}
    longest = {"torch/long.py": module("long").ljust(199_999) + "\n"}
    marked = "# This is an auto-generated file. Please do not modify it by hand.\n"
    dropped = {
        "torch/version.py": module("v"),
        "torch/testing/_internal/generated/d.py": module("d"),
        "torch/patterns.py": "# mypy: ignore-errors\n\n" + marked + module("p"),
        "torch/longer.py": module("longer").ljust(200_000) + "\n",
        "torch/short.py": module("s", 19) + 5 * "s_0 = 0\n",
        "torch/_C.pyi": module("i"),
        "torch/text.txt": module("t"),
        "torch/empty.py": "",
    }
    files = {**dropped, **dict(reversed(kept.items())), **longest}
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/mine.py").write_text(module("mine"))  # not the package's
    library = installed(tmp_path, files)
    assert dict(library.documents()) == {**kept, **longest}
    assert [key for key, _ in library.documents()] == sorted({**kept, **longest})
    assert library.name == "Python sources of PyTorch 9.8.7"
    described = library.describe()
    assert (described["format"], described["files"]) == ("pytorch", 5)
    assert described["bytes"] == sum(len(text) for text in {**kept, **longest}.values())
    assert library.stamp() is None


def test_a_remark_that_something_is_generated_leaves_a_file_in(tmp_path):
    text = "# There are generated files that depend on this one\n" + module("a", 60) + "# This is generated\n"
    assert list(installed(tmp_path, {"torch/a.py": text}).documents()) == [("torch/a.py", text)]


def test_line_ends_are_the_same_for_every_platform(tmp_path):
    text = module("a")
    unix = installed(tmp_path / "unix", {"torch/a.py": text})
    windows = installed(tmp_path / "windows", {"torch/a.py": text.replace("\n", "\r\n")})
    assert list(windows.documents()) == list(unix.documents()) == [("torch/a.py", text)]
    assert windows.describe() == unix.describe()


def test_other_text_or_another_grouping_is_another_description(tmp_path):
    text = module("a")
    before = installed(tmp_path / "one", {"torch/a.py": text, "torch/b.py": module("b")}).describe()
    other = installed(tmp_path / "two", {"torch/a.py": text, "torch/b.py": module("c")}).describe()
    assert other["sha256"] != before["sha256"]
    assert (other["files"], other["bytes"]) == (before["files"], before["bytes"])


def test_near_copies_have_one_key_so_that_they_land_in_one_split(tmp_path):
    files = {"torch/a.py": module("a"), "torch/b.py": module("b"), "torch/c.py": module("a", 12) + module("c", 18)}
    documents = list(installed(tmp_path, files).documents())
    assert documents == [("torch/a.py", files["torch/a.py"]), ("torch/b.py", files["torch/b.py"]),
                         ("torch/a.py", files["torch/c.py"])]  # fmt: skip


def test_what_was_read_is_counted(tmp_path):
    counted = []
    library = installed(tmp_path, {"torch/a.py": module("a"), "torch/b.py": module("b")})
    assert library.describe(read=counted.append)["bytes"] == sum(counted) > 0


@pytest.mark.parametrize("listed", [None, ["torch/__init__.pyi", "../../bin/torchrun.py"]])
def test_a_pytorch_that_does_not_list_its_sources_is_refused(tmp_path, listed):
    with pytest.raises(ValueError, match="PyTorch is not installed as a package that lists its files .*; name other"):
        installed(tmp_path, {}, listed).describe()


def test_a_pytorch_that_is_no_installed_package_is_refused(monkeypatch):
    monkeypatch.setattr(Distribution, "discover", lambda **_: iter(()))
    with pytest.raises(ValueError, match="PyTorch is not installed as a package that lists its files .*; name other"):
        open_sources((), text_field="text", id_field="id")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    library = installed(tmp_path, {"torch/a.py": module("a"), "torch/bad.py": b"ok\xff"})
    with pytest.raises(ValueError, match=r"bad\.py: not UTF-8 at byte 2"):
        library.describe()


def test_the_lines_of_a_text_are_counted_once_and_without_indentation_and_blank_ones():
    assert list(different_lines("\ta = 1 \n\n  \nb\n\n    a = 1\n")) == ["a = 1", "b"]


def test_two_fifths_of_the_shorter_text_make_a_near_copy():
    def lines(*ranges):
        return "\n".join(str(number) for numbers in ranges for number in numbers)

    long = lines(range(100))
    assert first_copies([long, lines(range(4), range(1000, 1006))]) == [0, 0]  # 4 of 10 lines
    assert first_copies([long, lines(range(3), range(1000, 1007))]) == [0, 1]
    assert first_copies([lines(range(4), range(1000, 1006)), long]) == [0, 0]
    assert first_copies([long, long, "", "", lines(range(500, 510))]) == [0, 0, 2, 3, 4]
    assert first_copies([]) == []


def test_near_copies_of_near_copies_belong_together():
    texts = ["a\nb", "c\nd", "x\ny", "b\nc"]  # the last joins the first two
    assert first_copies(texts) == [0, 0, 2, 0]


def test_pytorch_s_sources_are_what_there_is_without_an_entry():
    ((library,),) = open_sources((), text_field="text", id_field="id")
    assert isinstance(library, PyTorchSources)
    assert library.name == f"Python sources of PyTorch {version('torch').partition('+')[0]}"


def test_a_corpus_of_the_former_default_opens_and_is_not_taken_for_one_of_pytorch(tmp_path, monkeypatch):
    library = installed(tmp_path / "torch", {f"torch/{number}.py": module(f"m{number}") for number in range(60)})
    monkeypatch.setattr(opening, "PyTorchSources", lambda: library)
    config = DataConfig(vocab_size=257, holdout_percent=20)
    corpus = prepare(config, tmp_path / "corpus", progress=False)
    assert corpus.manifest["asked"]["sources"][0]["name"] == "PyTorch's Python sources"
    assert prepare(config, tmp_path / "corpus", progress=False).manifest == corpus.manifest
    manifest = read_sealed(corpus.folder / MANIFEST)
    file = {"format": "stdlib", "name": "standard library of Python 3.11.2", "bytes": 9, "sha256": "1", "files": 9}
    manifest["asked"]["sources"] = [{"name": "Python's standard library", "files": [{**file, "stamp": None}]}]
    write_sealed(corpus.folder / MANIFEST, manifest)
    assert open_corpus(corpus.folder).train.num_tokens == corpus.train.num_tokens
    message = r"other contents \(standard library of Python 3.11.2, asked for Python sources of PyTorch 9.8.7\)"
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "corpus", progress=False)


def test_the_text_and_the_split_of_the_pinned_pytorch_are_the_same_everywhere():
    """Wheels for Linux (with CUDA and without), macOS and Windows have these sources, for every Python."""
    found = version("torch").partition("+")[0]
    if found != "2.13.0":
        pytest.skip(f"the hash is that of PyTorch 2.13.0, this is {found}, whose sources are others")
    digest, documents, sizes = hashlib.sha256(), Counter(), Counter()
    for document in measured_documents(PyTorchSources(), 5, digest, skip=None):
        documents[document.split] += 1
        sizes[document.split] += document.num_bytes
    assert documents == {"train": 1718, "validation": 83, "test": 74}
    assert sizes == {"train": 32_932_559, "validation": 1_850_185, "test": 1_915_987}
    corpus = hashlib.sha256(digest.hexdigest().encode()).hexdigest()  # of one file, as a manifest has it
    assert corpus == "bd194fc9b566254f6ebf42d174dfcb656e59378528353678b9e549fe5f8daf4e"
