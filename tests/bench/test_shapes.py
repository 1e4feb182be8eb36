import dataclasses

import pytest

from memlayers.bench.shapes import AXES, SHAPES, axis_value, shape, sweep


def test_the_shapes_of_the_bars():
    for name, slots in (("512x512", 262_144), ("1024x1024", 1_048_576)):
        one = shape(name)
        assert (one.dim, one.value_dim, one.heads, one.topk) == (1024, 1024, 4, 32)
        assert (one.query_dim, one.tokens, one.slots) == (512, 2048, slots)
        assert one.table_bytes == slots * 4096
        assert one.config().slots == slots
    assert (shape("2048x2048").slots, shape("2048x2048").value_dim) == (4_194_304, 256)


def test_sweeps_vary_one_number():
    base = shape("512x512")
    values = {axis: [axis_value(axis, one) for one in sweep(axis, base)] for axis in AXES}
    assert values["slots"] == [2**14, 2**16, 2**18, 2**20, 2**22]
    assert values["topk"] == [8, 16, 32, 64, 128]
    assert values["tokens"] == [1, 8, 64, 512, 2048, 8192]
    fields = {"slots": "num_subkeys", "topk": "topk", "tokens": "tokens"}
    for axis in AXES:
        for one in sweep(axis, base):
            field = fields[axis]
            assert dataclasses.replace(one, name=base.name, **{field: getattr(base, field)}) == base


@pytest.mark.parametrize("name", SHAPES)
def test_a_sweep_of_any_shape_is_valid(name):
    for axis in AXES:
        assert len(sweep(axis, shape(name))) >= 3


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1, got 0"):
        dataclasses.replace(shape("tiny"), tokens=0)
    with pytest.raises(ValueError, match="topk must be at most num_subkeys"):
        dataclasses.replace(shape("tiny"), topk=17)
    with pytest.raises(ValueError, match="shapes must be among .*tiny, got 'huge'"):
        shape("huge")
