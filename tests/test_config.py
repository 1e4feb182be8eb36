import dataclasses
import json

import numpy as np
import pytest
import torch

from memlayers import MemoryConfig
from memlayers.checks import instead


def test_json_round_trip_gives_an_equal_configuration():
    config = MemoryConfig(dim=24, value_dim=12, heads=3, topk=5, num_subkeys=7, query_dim=6, query_hidden=(9, 8))
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_slots_are_the_square_of_the_sub_keys():
    assert MemoryConfig(dim=8, num_subkeys=512).slots == 262_144


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dim": 0}, "dim .* at least 1, got 0"),
        ({"dim": True}, "dim .* got True"),
        ({"value_dim": 0}, "value_dim .* at least 1"),
        ({"heads": -1}, "heads .* got -1"),
        ({"topk": 0}, "topk .* got 0"),
        ({"topk": 9, "num_subkeys": 8}, "topk .* num_subkeys = 8 .* got 9"),
        ({"topk": 65, "num_subkeys": 8, "keys": "flat"}, "topk .* = 64 .* got 65"),
        ({"num_subkeys": 1, "topk": 1}, "num_subkeys .* at least 2, got 1"),
        ({"num_subkeys": 65537}, "num_subkeys .* at most 65536, got 65537"),
        ({"query_dim": 7}, "query_dim .* even .* got 7"),
        ({"query_hidden": (0,)}, "query_hidden .* got 0"),
        ({"query_hidden": 64}, "query_hidden .* got 64"),
        ({"query_norm": "layer"}, "query_norm .* 'batch', 'rms', 'none', got 'layer'"),
        ({"keys": "lsh"}, "keys .* 'product', 'flat', got 'lsh'"),
        ({"query_bias": 1}, "query_bias .* got 1"),
        ({"value_dropout": 1.0}, "value_dropout .* at least 0 and below 1, got 1.0"),
        ({"dim": 10**400}, "dim must be an integer from 1 to 2\\*\\*53, got 1000"),
        ({"dim": 2**53 + 1}, "dim must be an integer from 1 to 2\\*\\*53, got 9007199254740993"),
        ({"value_dropout": 10**400}, "value_dropout must be a finite number .* got 1000"),
    ],
)
def test_bad_fields_are_named_with_value_and_what_is_allowed(fields, named):
    with pytest.raises(ValueError, match=named):
        MemoryConfig(**{"dim": 8, **fields})


def test_the_largest_integer_is_the_last_that_a_float_knows():
    assert MemoryConfig(dim=2**53).dim == 9007199254740992


def test_flat_keys_allow_odd_queries_and_more_neighbours_than_sub_keys():
    assert MemoryConfig(dim=8, num_subkeys=4, topk=16, query_dim=7, keys="flat").topk == 16


def test_unknown_and_missing_fields_are_errors():
    with pytest.raises(ValueError, match="^unknown memory configuration field 'head'; did you mean 'heads'\\?$"):
        MemoryConfig.from_dict({"dim": 8, "head": 4})
    with pytest.raises(ValueError, match="^unknown memory configuration field 'zzz'; allowed: dim, value_dim, heads, "):
        MemoryConfig.from_dict({"dim": 8, "zzz": 4})
    with pytest.raises(ValueError, match="'dim'"):
        MemoryConfig.from_dict({"heads": 4})
    with pytest.raises(ValueError, match="must hold fields and their values, got 3"):
        MemoryConfig.from_dict(3)


def test_a_name_with_another_section_or_none_is_known_by_its_last_part():
    known = ["model.heads", "model.dim", "memory.heads", "memory.topk", "tokens"]
    assert instead("topk", known) == "did you mean 'memory.topk'?"
    assert instead("model.topk", known) == "did you mean 'memory.topk'?"
    assert instead("heads", known, spelled="--{}") == "did you mean --model.heads or --memory.heads?"
    assert instead("memory.head", known) == "did you mean 'memory.heads'?"
    assert instead("memory.zzz", known) == "allowed: memory.heads, memory.topk"


def test_numbers_of_numpy_and_torch_are_numbers_and_can_be_written_as_json():
    config = MemoryConfig(dim=np.int64(32), heads=torch.tensor(2), value_dropout=np.float32(0.25))
    assert json.loads(json.dumps(dataclasses.asdict(config)))["value_dropout"] == 0.25
    assert [type(value) for value in (config.dim, config.heads, config.value_dropout)] == [int, int, float]
    with pytest.raises(ValueError, match="dim must be an integer"):
        MemoryConfig(dim=np.float32(32))
