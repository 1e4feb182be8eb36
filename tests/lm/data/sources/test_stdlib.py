import sysconfig
from pathlib import Path

import pytest

from memlayers.lm.data.sources import StandardLibrary, open_sources


def test_the_standard_library_without_tests_packages_and_generated_files(tmp_path):
    kept = ["abc.py", "json/__init__.py", "json/decoder.py", "unittest/case.py", "zipfile.py"]
    dropped = [
        "test/test_abc.py",
        "unittest/test/test_case.py",
        "idlelib/idle_test/htest.py",
        "lib2to3/tests/data/x.py",
        "site-packages/torch/__init__.py",
        "dist-packages/apt.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "sitecustomize.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "LICENSE.txt",
    ]
    for name in [*dropped, *reversed(kept)]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    library = StandardLibrary(tmp_path)
    assert list(library.documents()) == [(name, f"# {name}\n") for name in kept]
    before = library.describe()
    assert (before["files"], before["bytes"]) == (5, sum(len(f"# {name}\n") for name in kept))
    (tmp_path / "abc.py").rename(tmp_path / "abd.py")
    assert library.describe()["sha256"] != before["sha256"]
    assert library.stamp() is None


def test_a_library_without_sources_or_not_utf8_is_named(tmp_path):
    with pytest.raises(ValueError, match="no source files"):
        StandardLibrary(tmp_path).describe()
    (tmp_path / "bad.py").write_bytes(b"ok\xff")
    (tmp_path / "good.py").write_bytes(b"ok")
    with pytest.raises(ValueError, match=r"bad\.py: not UTF-8 at byte 2"):
        list(StandardLibrary(tmp_path).documents())
    skipped = []
    assert list(StandardLibrary(tmp_path).documents(skip=skipped.append)) == [("good.py", "ok")]
    assert skipped == [f"{tmp_path / 'bad.py'}: not UTF-8 at byte 2"]


def test_the_running_standard_library_is_what_there_is_without_an_entry():
    ((library,),) = open_sources((), text_field="text", id_field="id")
    documents = list(library.documents())
    names = [document.key for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name or "/tests/" in name]
    assert len(names) > 500
    assert (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text("utf-8") in [d.text for d in documents]
