import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from transformers import AutoModelForCausalLM

from memlayers.files import replaced_together
from memlayers.models import memory_layers

IDS = torch.arange(24).view(2, 12)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def test_a_save_that_breaks_off_leaves_the_folder_as_it_was(with_memory, tmp_path, monkeypatch):
    with_memory.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"not ours")
    before = contents(tmp_path)

    def half_a_file(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", half_a_file)
        for memory in memory_layers(with_memory).values():
            memory.values.weight.data.zero_()
        with pytest.raises(OSError, match="disk full"):
            with_memory.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    with_memory.save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}


@pytest.mark.parametrize("sizes", [("20KB", "1GB"), ("1GB", "20KB")])
def test_weights_of_an_earlier_save_do_not_stay(with_memory, tmp_path, sizes):
    with_memory.save_pretrained(tmp_path, max_shard_size=sizes[0])
    for parameter in with_memory.parameters():
        parameter.data += 1
    with_memory.save_pretrained(tmp_path, max_shard_size=sizes[1])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, with_memory.eval()(IDS).logits)
    weights = [path.name for path in tmp_path.iterdir() if "safetensors" in path.name]
    assert (weights == ["model.safetensors"]) is (sizes[1] == "1GB")


def test_variants_stand_beside_each_other(with_memory, tmp_path):
    with_memory.save_pretrained(tmp_path)
    with_memory.save_pretrained(tmp_path, variant="half", max_shard_size="20KB")
    with_memory.save_pretrained(tmp_path, variant="half")
    names = {path.name for path in tmp_path.iterdir() if "safetensors" in path.name}
    assert names == {"model.safetensors", "model.half.safetensors"}


def test_only_the_main_process_writes(with_memory, tmp_path):
    with_memory.save_pretrained(tmp_path / "new", is_main_process=False)
    assert contents(tmp_path / "new") == {}
    with_memory.save_pretrained(tmp_path / "old")
    before = contents(tmp_path / "old")
    with_memory.save_pretrained(tmp_path / "old", False)
    assert contents(tmp_path / "old") == before


def test_a_file_is_no_folder(with_memory, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="the folder to save to must be none or a folder, got the file .*file"):
        with_memory.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_save_killed_between_its_files_is_loaded_as_one_of_the_two(with_memory, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed_at(number, calls):
        def fail(call):
            def failing(*args, **options):
                calls.append(args)
                if len(calls) >= number:
                    raise Killed
                return call(*args, **options)

            return failing

        for name in ("rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, fail(getattr(os, name)))

    expected, number, found = [], 0, []
    for size in ("1GB", "20KB"):
        with_memory.save_pretrained(tmp_path / size, max_shard_size=size)
        expected.append(with_memory.eval()(IDS).logits)
        for parameter in with_memory.parameters():
            parameter.data += 0.1
    folder, calls = tmp_path / "folder", [None] * 100
    while number < len(calls):
        number, calls = number + 1, []
        shutil.copytree(tmp_path / "1GB", folder)
        with monkeypatch.context() as patch, suppress(Killed):
            killed_at(number, calls)
            with replaced_together(folder, stale="model.*") as aside:
                for path in (tmp_path / "20KB").iterdir():
                    shutil.copy(path, aside)
        logits = (type(with_memory) if number % 2 else AutoModelForCausalLM).from_pretrained(folder)(IDS).logits
        found.append(next(i for i, one in enumerate(expected) if torch.equal(one, logits)))
        shutil.rmtree(folder)
    assert found == sorted(found)
    assert {0, 1} == set(found)
