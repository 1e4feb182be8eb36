import importlib
import json
import os

import numpy as np
import pytest

from memlayers.lm.data import DataConfig, open_corpus, prepare

prepare_module = importlib.import_module("memlayers.lm.data.prepare")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").mkdir()
    draw = np.random.default_rng(0)
    rows = [{"id": number, "text": " ".join(draw.choice(["tea", "cup"], size=20))} for number in range(100)]
    (tmp_path / "text" / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(sources=(str(tmp_path / "text"),), vocab_size=257, holdout_percent=10)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_to_an_empty_or_missing_folder_leads_to_the_corpus(config, tmp_path, is_there):
    (tmp_path / "disk").mkdir()
    if is_there:
        (tmp_path / "disk" / "corpus").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "corpus")
    made = prepare(config, tmp_path / "link", progress=False)
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["corpus"]
    assert open_corpus(tmp_path / "link").manifest == made.manifest
    assert prepare(config, tmp_path / "link", progress=False).manifest == made.manifest


def test_a_mount_point_is_refused_before_any_work_unless_it_holds_a_corpus(config, tmp_path, monkeypatch):
    ready = prepare(config, tmp_path / "ready", progress=False)
    (tmp_path / "mounted").mkdir()
    mounts = [str(tmp_path / "mounted"), str(tmp_path / "ready")]
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in mounts)
    monkeypatch.setattr(prepare_module, "open_sources", lambda *_, **__: pytest.fail("looked at the sources"))
    message = f"mounted is a mount point, .*: name a folder in it, such as {tmp_path / 'mounted' / 'corpus'}"
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "mounted", progress=False)
    assert prepare(config, tmp_path / "ready", progress=False).manifest == ready.manifest


@pytest.mark.parametrize("entry", ["~/text", "~/text/docs.jsonl", "~/text/*.jsonl"])
def test_a_source_may_begin_with_the_home_folder(config, tmp_path, monkeypatch, opened_names, entry):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened_names(entry) == [str(tmp_path / "text" / "docs.jsonl")]


@pytest.fixture
def opened_names():
    from memlayers.lm.data.sources import open_sources

    return lambda entry: [source.name for source in open_sources([entry], text_field="text", id_field="id")[0]]
