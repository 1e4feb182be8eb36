"""How kernels are made of functions: what they share is compiled once, and what comes from the disk runs as well."""

import pytest
import torch

from memlayers.ops.cpu import cache, compile
from memlayers.ops.cpu.compile import kernel, part, shared
from memlayers.ops.cpu.intrinsics import i64
from memlayers.ops.cpu.launch import launch


@part
def _square(x):
    return x * x


@part
def _sum_of_squares(x, y):
    return _square(x) + _square(y)


def _store_length(x, y, address):
    i64(address)[0] = _sum_of_squares(x, y)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """What is compiled in this test, and whether it came from the disk."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    cache._made.cache_clear()
    found = []

    def keep(function, *rest):
        result = cache.compile_kept(function, *rest)
        found.append((function.__name__, bool(result.cache_hits)))
        return result

    monkeypatch.setattr(compile, "compile_kept", keep)
    yield found
    cache._made.cache_clear()


def make_kernels():
    store_length = shared(_store_length)

    @kernel
    def length(counters, x, y, out):
        store_length(x, y, out)

    @kernel
    def twice_the_length(counters, x, y, out):
        store_length(x, y, out)
        i64(out)[0] *= 2

    return length, twice_the_length


def test_what_kernels_share_is_compiled_once_and_called_from_the_disk_as_well(compiled):
    names = ["_store_length", "length", "twice_the_length"]
    for is_kept in (False, True):
        out = torch.zeros(2, dtype=torch.int64)
        for number, one in enumerate(make_kernels()):
            assert launch(one, 1, x=3, y=4, out=out[number:]) == 0
        assert out.tolist() == [25, 50]
        assert compiled == [(name, is_kept) for name in names]
        compiled.clear()


def test_parts_have_no_machine_code_of_their_own(compiled):
    make_kernels()
    (one,) = _sum_of_squares.overloads.values()
    assert one.library.get_pointer_to_function(one.fndesc.llvm_func_name) == 0
