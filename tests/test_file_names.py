"""Names that are read from a file stay inside its folder, whatever they are."""

import os
import random

import pytest

from memlayers.files import path_below, refuse_others, verify_files


def test_a_name_is_a_text(tmp_path):
    with pytest.raises(ValueError, match="3 is not the path of a file in it"):
        path_below(tmp_path, 3)


def test_a_link_that_leaves_the_folder_is_refused_and_one_within_it_is_not(tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "a").write_text("a")
    (tmp_path / "secret").write_text("s")
    (folder / "below" / "inside").symlink_to("../a")
    (folder / "outside").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    assert path_below(folder, "below/inside") == folder / "below" / "inside"
    for name in ("outside", "up/secret", "up/folder/../secret"):
        with pytest.raises(ValueError, match=f"^{folder} is damaged: {name!r} is "):
            path_below(folder, name)
    (tmp_path / "link").symlink_to(folder)  # what a user names may be a link itself
    assert path_below(tmp_path / "link", "a") == tmp_path / "link" / "a"


def test_files_of_the_hub_s_cache_are_links_to_the_blobs_beside_it(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    (tmp_path / "models--x" / "blobs" / "hash").write_text("x")
    (snapshot / "weights").symlink_to("../../blobs/hash")
    assert path_below(snapshot, "weights").read_text() == "x"
    (snapshot / "refs").symlink_to("../../refs")
    with pytest.raises(ValueError, match="'refs' is a link to outside of it"):
        path_below(snapshot, "refs")


def test_whatever_a_name_is_it_lies_in_the_folder_or_is_refused(tmp_path):
    draw, folder = random.Random(0), tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "link").symlink_to("..")
    accepted = 0
    for _ in range(3000):
        name = "".join(
            draw.choices(["a", "b", "..", ".", "/", "//", "\\", ":", "c", "\0", "link", "~", " "], k=draw.randint(1, 6))
        )
        try:
            path = path_below(folder, name)
        except ValueError:
            continue
        accepted += 1
        assert os.path.realpath(path).startswith(f"{os.path.realpath(folder)}/")
    assert 300 < accepted < 2000


@pytest.mark.parametrize("described", [{"a": 3}, {"a": None}, {"a": {}}, {"a": {"sha256": 3}}])
def test_a_description_of_another_form_is_refused(tmp_path, described):
    (tmp_path / "a").write_text("a")
    with pytest.raises(ValueError, match="is damaged: what should describe its files does not"):
        verify_files(tmp_path, described)


def test_what_a_library_would_load_and_nobody_wrote_is_refused(tmp_path):
    for name in ("model.safetensors", "notes.txt", "README.md"):
        (tmp_path / name).write_text("")
    refuse_others(tmp_path, {"model.safetensors"})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="'adapter_config.json' was not written with the files in it"):
        refuse_others(tmp_path, {"model.safetensors"})
