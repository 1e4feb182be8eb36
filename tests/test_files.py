import json

import pytest

from memlayers.files import read_sealed, write_sealed


def test_a_sealed_file_is_json_and_comes_back(tmp_path):
    file = tmp_path / "manifest.json"
    write_sealed(file, {"name": "ä", "zeros": "0" * 64})
    assert read_sealed(file) == {"name": "ä", "zeros": "0" * 64}
    assert set(json.loads(file.read_text())) == {"sha256", "name", "zeros"}


def test_every_flipped_bit_and_every_truncation_of_a_sealed_file_is_noticed(tmp_path):
    file = tmp_path / "manifest.json"
    write_sealed(file, {"format": 1, "text": "a b"})
    good = file.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            with pytest.raises(ValueError, match="manifest.json is damaged"):
                read_sealed(file)
        file.write_bytes(good[:place])
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            read_sealed(file)
    file.unlink()
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        read_sealed(file)
