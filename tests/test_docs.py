"""The documentation: nothing in it points nowhere, every public name has its place, and the tutorial runs."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import memlayers
import memlayers.diagnosis
import memlayers.distributed
import memlayers.models
import memlayers.optim

ROOT = Path(__file__).parent.parent
# Where the README's links point, since it is PyPI's page, too.
PUBLISHED = r"https://(?:github|raw\.githubusercontent)\.com/memlayers/memlayers/(?:(?:blob|tree)/)?main/"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REFERENCES = [
    reference
    for page in sorted((DOCS / "reference").glob("*.md"))
    for reference in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_link_and_picture_of_a_page_is_there(page):
    for target in links(page.read_text()):
        file, _, anchor = target.partition("#")
        at = (page.parent / file).resolve() if file else page
        assert at.exists(), target
        assert DOCS in at.parents or page.parent == ROOT, f"{target} leaves the site"
        if anchor:
            assert anchor in anchors(at.read_text()), target


def test_the_readme_s_links_work_on_other_sites():
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_readme_s_map_has_every_folder_and_only_files_that_are_there():
    (found,) = re.findall(r"```\nsrc/memlayers/\n(.*?)\ntests/", (ROOT / "README.md").read_text(), re.DOTALL)
    package = ROOT / "src" / "memlayers"
    assert set(re.findall(r"\w+\.py\b", found)) <= {path.name for path in package.rglob("*.py")}
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= set(re.findall(r"(\w+)/ ", found))


def test_the_first_page_links_every_how_to_page():
    first = (DOCS / "index.md").read_text()
    assert [page.name for page in sorted((DOCS / "how-to").glob("*.md")) if f"how-to/{page.name}" not in first] == []


def test_the_site_is_searched_from_the_disk_and_fetches_nothing():
    text = (ROOT / "mkdocs.yml").read_text()
    config = yaml.safe_load(text)
    assert {"search", "offline"} <= {plugin for plugin in config["plugins"] if isinstance(plugin, str)}
    # The plugin adds one from elsewhere, unless there is one of this name.
    assert [script for script in config["extra"]["polyfills"] if "iframe-worker" in script] == ["iframe-worker.js"]
    assert (DOCS / "iframe-worker.js").is_file()
    assert "https:" not in (DOCS / "iframe-worker.js").read_text() + text


def test_every_page_is_in_the_navigation_once():
    text = (ROOT / "mkdocs.yml").read_text()
    assert sorted(leaves(yaml.safe_load(text)["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize(
    "module",
    [
        memlayers,
        memlayers.diagnosis,
        memlayers.distributed,
        memlayers.explorer,
        memlayers.finetuning,
        memlayers.models,
        memlayers.optim,
    ],
    ids=lambda module: module.__name__,
)
def test_every_public_name_is_in_the_reference(module):
    described = {name.rpartition(".")[2] for name in REFERENCES}
    assert [name for name in module.__all__ if name not in described] == []


def test_the_reference_names_what_exists_once():
    assert len(set(REFERENCES)) == len(REFERENCES)
    for reference in REFERENCES:
        module, _, name = reference.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, reference


def test_the_first_page_s_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    exec(compile(code, "index.md", "exec"), {})


def test_the_page_about_gpus_runs_on_what_there_is():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "how-to" / "gpu.md").read_text(), re.DOTALL):
        exec(compile(code, "gpu.md", "exec"), names)


def test_the_page_about_large_tables_runs_and_prints_what_it_shows(capsys):
    page = (DOCS / "how-to" / "large-tables.md").read_text()
    for code, shown in re.findall(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", page, re.DOTALL):
        exec(compile(code, "large-tables.md", "exec"), {})
        assert capsys.readouterr().out == shown
    bytes_of_columns = memlayers.distributed.traffic(slots=1024**2, width=1024, rows=128, tokens=2048, ranks=8).columns
    assert f"| {bytes_of_columns / 1e6:.0f} MB |" in page


@pytest.mark.slow  # importing these libraries takes seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "library"), [("trl", "trl"), ("lightning", "lightning"), ("export", "onnxscript")])
def test_the_pages_about_other_libraries_run(page, library, tmp_path, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "how-to" / f"{page}.md").read_text(), re.DOTALL):
        exec(compile(code, f"{page}.md", "exec"), names)


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # of Trainer, where there is no GPU
def test_the_page_about_facts_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "how-to" / "facts.md").read_text(), re.DOTALL):
        exec(compile(code, "facts.md", "exec"), names)


def test_the_page_about_tables_in_files_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "how-to" / "tables-in-files.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(code, "tables-in-files.md", "exec"), names)
    assert names["table"].checkpoints == [1]
    assert (tmp_path / "tables" / "transformer.h.2.mlp" / "table.json").is_file()


def test_the_tutorial_runs_and_prints_what_it_shows(capsys):
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", (DOCS / "tutorial.md").read_text(), re.DOTALL)
    assert len(blocks) > 5
    names = {}
    for code, shown in blocks:
        exec(compile(code, "tutorial.md", "exec"), names)
        printed, said = capsys.readouterr()
        assert without_numbers(printed) == without_numbers(shown)
        assert said == "" or "Loading weights" in said  # the bar of from_pretrained
    # The numbers depend on the machine; what the text says about them does not.
    known, was = names["known"], names["was"]
    assert known(names["model"]) > 80 > was > 30
    assert known(names["loaded"]) == known(names["model"])
    assert known(names["plain"]) > 90
    assert names["report"].overall.usage > 30


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_what_is_supported_is_what_the_tests_say():
    make_supported = script("make_supported")
    rows = make_supported.promises()
    assert len(rows) > 60
    assert len({(row.topic, row.what) for row in rows}) == len(rows)
    assert make_supported.PAGE.read_text() == make_supported.page(rows), "run python docs/make_supported.py"


@pytest.mark.parametrize(
    "mark",
    [
        '@pytest.mark.promise("Masks", "what", "promised", "how")',
        '@pytest.mark.promise("No topic", "what", "supported", "how")',
        '@pytest.mark.promise("Masks", "what", "supported", "of two\\nlines")',
        '@pytest.mark.promise("Masks", WHAT, "supported", "how")',
        '@pytest.mark.parametrize("a", [pytest.param(1, marks=pytest.mark.promise("Masks", "what", "no", "how"))])',
    ],
)
def test_a_mark_that_makes_no_row_is_refused(mark, tmp_path):
    make_supported = script("make_supported")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_this.py").write_text(f"{mark}\ndef test_it(): pass\n")
    with pytest.raises(ValueError, match="tests/test_this.py, line 1: a promise must"):
        make_supported.promises(tmp_path / "tests")


def test_the_pictures_are_drawn_by_their_script(tmp_path, capsys):
    pictures = script("pictures")
    pictures.main(tmp_path)
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(pictures.PICTURES)
    explanation = (DOCS / "explanation.md").read_text()
    for name in drawn:
        assert f"]({name})" in explanation
        assert (tmp_path / name).stat().st_size < 150_000
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(pictures.PICTURES)


def links(text):
    """Targets within the repository, of links and pictures outside of code.

    The README's are absolute, since it is PyPI's page, too.
    """
    text = re.sub(rf"\]\({PUBLISHED}", "](", text)
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """As the site's table of contents makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def leaves(nav):
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(part)]


def without_numbers(text):
    return re.sub(r"\d+(\.\d+)?", "0", text)
