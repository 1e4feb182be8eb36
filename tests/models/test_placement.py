import dataclasses
import json

import pytest

from memlayers import MemoryConfig
from memlayers.models import MemoryPlacement, default_layer


def test_round_trip_through_json(memory_config):
    placement = MemoryPlacement(config=memory_config, layers=[3, 1], share_values=True)
    assert placement.layers == (1, 3)
    section = json.loads(json.dumps(placement.to_dict()))
    assert section["mode"] == "replace"
    assert section.keys() == {"config", "kind", "layers", "mode", "share_values"}  # as folders always had them
    assert MemoryPlacement.from_dict(section) == placement
    few = dataclasses.replace(placement, value_bits=4)
    assert few.to_dict() == {**section, "value_bits": 4}
    assert MemoryPlacement.from_dict(few.to_dict()) == few
    named = MemoryPlacement(config=memory_config, layers=["b.mlp", "a.mlp"], kind="MemoryPlus", mode="parallel")
    assert MemoryPlacement.from_dict(json.loads(json.dumps(named.to_dict()))) == named


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"layers must be a non-empty list .* got \[\]"),
        (2, "layers must be a non-empty list .* got 2"),
        ("2", "layers must be a non-empty list .* got '2'"),
        ([0], "layers must be integers of at least 1 .* got 0"),
        ([1, True], "layers must be integers of at least 1 .* got True"),
        ([1.0], r"layers must be integers of at least 1 .* got 1\.0"),
        ([1, "h.2"], "or all names of modules, got 'h.2'"),
        ([""], "layers must be names of modules inside of the model, got ''"),
        (["h.2", "h.2"], "layers must not name a module twice"),
        ([2, 1, 2], r"layers must not name a module twice, got \[2, 1, 2\]"),
    ],
)
def test_layers_are_checked(memory_config, layers, message):
    with pytest.raises(ValueError, match=message):
        MemoryPlacement(config=memory_config, layers=layers)


def test_other_fields_are_checked(memory_config):
    with pytest.raises(ValueError, match="config must be a MemoryConfig, got None"):
        MemoryPlacement(config=None, layers=[1])
    with pytest.raises(ValueError, match="share_values must be True or False, got 1"):
        MemoryPlacement(config=memory_config, layers=[1], share_values=1)


def test_a_model_that_does_not_fit_is_refused(memory_config):
    placement = MemoryPlacement(config=memory_config, layers=[2, 5])
    placement.check_fits(num_blocks=5, hidden_size=16)
    with pytest.raises(ValueError, match=r"layers must be within 1\.\.4, .* got 5"):
        placement.check_fits(num_blocks=4, hidden_size=16)
    with pytest.raises(ValueError, match=r"config\.dim must be 32, .* got 16"):
        placement.check_fits(num_blocks=5, hidden_size=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda section: section.update(mode="beside"), "mode must be one of 'replace', 'parallel', got 'beside'"),
        (lambda section: section.update(kind=3), "kind must be the name of a class of memory layers, got 3"),
        (lambda section: section.update(gate=1), "unknown key 'gate' in memory; allowed: config, kind, layers, mode"),
        (lambda section: section.pop("layers"), "'layers' is missing"),
        (lambda section: section.update(config=3), "config must be a dictionary, got 3"),
        (lambda section: section["config"].update(slots=3), "slots"),
    ],
)
def test_sections_are_checked(memory_config, change, message):
    section = MemoryPlacement(config=memory_config, layers=[1]).to_dict()
    change(section)
    with pytest.raises(ValueError, match=message):
        MemoryPlacement.from_dict(section)
    with pytest.raises(ValueError, match="memory must be a dictionary of config, kind, layers, mode, .* got None"):
        MemoryPlacement.from_dict(None)


def test_every_memory_option_survives():
    config = MemoryConfig(
        dim=16, value_dim=8, heads=3, topk=5, num_subkeys=7, query_dim=6, query_hidden=(9, 10), query_norm="rms",
        query_bias=False, keys="flat", input_dropout=0.1, query_dropout=0.2, value_dropout=0.3,
        value_std=0.4,
    )  # fmt: skip
    default = MemoryConfig(dim=1)
    for field in dataclasses.fields(MemoryConfig):
        assert getattr(config, field.name) != getattr(default, field.name), field.name
    section = MemoryPlacement(config=config, layers=[1]).to_dict()
    assert MemoryPlacement.from_dict(json.loads(json.dumps(section))).config == config


def test_the_default_layer_is_middle_to_late():
    assert [default_layer(depth) for depth in (1, 2, 4, 6, 8, 12, 16, 24)] == [1, 2, 3, 5, 6, 9, 12, 18]
