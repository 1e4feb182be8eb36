"""What is published: wheel and source archive hold what a user needs, and the wheel works where it is installed."""

import os
import re
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from memlayers.version import __version__

ROOT = Path(__file__).parent.parent


def run(*command: str, **settings) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "--directory", str(folder), cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def archive(built):
    (found,) = built.glob("*.tar.gz")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert re.fullmatch(r"memlayers-0\.2\.0(\.dev0)?-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        assert sum(each.file_size for each in opened.infolist()) < 2_000_000
    source = {file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src").rglob("*") if is_source(file)}
    assert "memlayers/py.typed" in source
    assert {name for name in names if ".dist-info/" not in name} == source
    info = {name.partition("/")[2] for name in names if ".dist-info/" in name}
    assert info == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_source_archive_holds_what_the_wheel_is_made_of(archive):
    with tarfile.open(archive) as opened:
        names = [name.partition("/")[2] for name in opened.getnames()]
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {
        "src", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", ".gitignore",
    }  # fmt: skip
    assert not any(name.endswith((".png", ".pyc")) for name in names)
    assert archive.stat().st_size < 1_000_000


def is_source(file: Path) -> bool:
    return file.is_file() and file.suffix in (".py", ".typed", ".html", ".css", ".js")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python and the command of an environment that holds the wheel alone; it borrows what the wheel requires."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    (packages,) = (folder / "lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    run(*install, "--no-deps", "--no-index", str(wheel))
    # Only packages: lines of code in .pth files there, as those of an editable installation, are not run.
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def in_it(installed: Path, tmp_path: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["MEMLAYERS_REFERENCE"] = "1"  # in a new place they would be compiled anew, which takes a minute
    return run(str(installed / command[0]), *command[1:], cwd=tmp_path, env=environment)


def test_the_command_is_there(installed, tmp_path):
    assert re.fullmatch(r"memlayers 0\.2\.0(\.dev0)?\n", in_it(installed, tmp_path, "memlayers", "--version"))


def test_the_readme_s_first_example_runs_on_what_was_installed(installed, tmp_path):
    text = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n?```\n(.*?)```", text, re.DOTALL).groups()
    where = "import memlayers\nprint(memlayers.__file__)\n"
    file, _, rest = in_it(installed, tmp_path, "python", "-c", where + code).partition("\n")
    assert Path(file).is_relative_to(installed.parent)
    assert rest.strip() == printed.strip()


@pytest.mark.slow
def test_the_description_can_be_shown_by_a_registry(wheel, archive):
    pytest.importorskip("twine", reason="twine is not installed: the description was not checked")
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(archive))


def test_the_metadata_say_where_it_comes_from(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("/METADATA"))
        metadata = opened.read(name).decode()
    for line in (
        "Author: memlayers contributors",
        "Project-URL: Homepage, https://github.com/memlayers/memlayers",
        "Project-URL: Issues, https://github.com/memlayers/memlayers/issues",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
    ):
        assert f"{line}\n" in metadata
    assert "Keywords: " in metadata


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
