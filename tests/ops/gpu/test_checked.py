"""The checked interpreter finds what it is there to find: each fault is planted in a small kernel."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("only what is interpreted can be checked", allow_module_level=True)

import triton
import triton.language as tl

from kernel_tools.interpreted import UnsafeKernelError, checked
from memlayers.ops.gpu.launch import launch


@triton.jit
def _copy(x, y, shift, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place + shift, mask=place < size, other=0), mask=place < size)


@triton.jit
def _helper(x, place):
    return tl.load(x + place)


@triton.jit
def _copy_by_helper(x, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, _helper(x, place), mask=place < size)


@triton.jit
def _store_anywhere(y, places, BLOCK: tl.constexpr):
    place = tl.load(places + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y + place, tl.arange(0, BLOCK))


@triton.jit
def _spread(x, y, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0) * BLOCK + lane, tl.load(x + lane * 0))


@triton.jit
def _neighbour(x):
    program = tl.program_id(0)
    tl.store(x + program + 1, tl.load(x + program))


@triton.jit
def _neighbour_before(x):
    program = tl.program_id(0)
    tl.store(x + tl.num_programs(0) - program, tl.load(x + tl.num_programs(0) - 1 - program))


@triton.jit
def _read_back(x):
    tl.store(x, 1.0)
    tl.store(x + 1, tl.load(x))


@triton.jit
def _add_up(total, x):
    tl.atomic_add(total, tl.load(x + tl.program_id(0)))


@triton.jit
def _count_and_look(total, x):
    tl.atomic_add(total, 1)
    tl.store(x + tl.program_id(0), tl.load(total))


def numbers(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def test_what_is_legal_passes_and_is_counted():
    x, y = numbers(7), torch.zeros(7)
    with checked() as launches:
        launch(_copy, (2,), x, y, 0, 7, BLOCK=4)
    assert torch.equal(x, y)
    (found,) = launches
    assert (found.name, found.grid, found.settings["BLOCK"]) == ("_copy", (2,), 4)
    assert (found.loaded, found.stored) == (28, 28)
    assert found.arguments["x"].distinct_loaded == found.arguments["y"].distinct_stored == 28
    assert found.arguments["x"].stored == found.arguments["y"].loaded == 0


def test_what_is_loaded_again_counts_again_but_lanes_of_one_load_do_not():
    x, y = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(8)
    with checked() as launches:
        launch(_spread, (2,), x, y, BLOCK=4)
    assert (launches[0].arguments["x"].loaded, launches[0].arguments["x"].distinct_loaded) == (4, 2)
    assert launches[0].arguments["y"].stored == 32


@pytest.mark.parametrize("shift", [1, -1, 2**20, -(2**20)])
def test_a_load_beside_a_tensor(shift):
    beside = numbers(3, 7)  # its own neighbours are legal memory, and not its
    with (
        pytest.raises(UnsafeKernelError, match=r"_copy, line \d+: program \(\d,\) loads \d+ times beside `x`"),
        checked(),
    ):
        launch(_copy, (2,), beside[1], torch.zeros(7), shift, 7, BLOCK=4)


def test_a_store_beside_a_tensor_though_another_argument_is_there():
    both = torch.zeros(8)
    with (
        pytest.raises(UnsafeKernelError, match="stores 4 times beside `y` of shape \\[4\\].*: at element 4 to 7"),
        checked(),
    ):
        launch(_copy, (2,), numbers(8), both[:4], 0, 8, BLOCK=4)
    assert not both[4:].any()


def test_a_load_between_the_elements_of_a_strided_tensor():
    with pytest.raises(UnsafeKernelError, match="beside `x`"), checked():
        launch(_copy, (1,), numbers(4, 2)[:, 0], torch.zeros(4), 0, 4, BLOCK=4)


def test_an_empty_tensor_has_no_element():
    with pytest.raises(UnsafeKernelError, match="beside `x`"), checked():
        launch(_copy, (1,), torch.zeros(0), torch.zeros(4), 0, 4, BLOCK=4)


def test_a_fault_in_a_function_that_a_kernel_calls():
    with pytest.raises(UnsafeKernelError, match="_copy_by_helper, line .* beside `x`"), checked():
        launch(_copy_by_helper, (2,), numbers(7), torch.zeros(7), 7, BLOCK=4)


def test_two_programs_that_store_to_one_place():
    places = torch.tensor([0, 1, 2, 3, 5, 3, 6, 7])
    with (
        pytest.raises(UnsafeKernelError, match=r"program \(1,\) stores what program \(0,\) has stored: element 3"),
        checked(),
    ):
        launch(_store_anywhere, (2,), torch.zeros(8, dtype=torch.int32), places, BLOCK=4)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(_neighbour, "loads what program (0,) has stored"), (_neighbour_before, "stores what program (0,) has loaded")],
    ids=["stored, then loaded", "loaded, then stored"],
)
def test_a_program_that_needs_what_another_one_writes(kernel, said):
    with pytest.raises(UnsafeKernelError) as error, checked():
        launch(kernel, (2,), numbers(3))
    assert said in str(error.value)


def test_lanes_of_one_store_that_do_not_agree():
    with pytest.raises(UnsafeKernelError, match="different values to one place"), checked():
        launch(_store_anywhere, (1,), torch.zeros(8, dtype=torch.int32), torch.tensor([0, 1, 1, 2]), BLOCK=4)


def test_a_program_that_reads_what_it_has_written():
    with pytest.raises(UnsafeKernelError, match=r"loads what program \(0,\) has stored"), checked():
        launch(_read_back, (1,), numbers(2))


def test_atomics():
    with pytest.raises(UnsafeKernelError, match="order of programs"), checked():
        launch(_add_up, (3,), torch.zeros(1), numbers(3))
    total = torch.zeros(1, dtype=torch.int32)
    with checked():  # integers are the same in any order
        launch(_add_up, (3,), total, torch.arange(3, dtype=torch.int32))
    assert total == 3
    with pytest.raises(UnsafeKernelError, match="updates what .* loaded"), checked():
        launch(_count_and_look, (3,), torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))


def test_a_kernel_may_be_let_race_but_not_leave_its_tensors():
    with checked(may_race=["_neighbour", "_copy"]):
        launch(_neighbour, (2,), numbers(3))
    with pytest.raises(UnsafeKernelError, match="beside `x`"), checked(may_race=["_copy"]):
        launch(_copy, (1,), numbers(3), torch.zeros(4), 0, 4, BLOCK=4)


def test_nothing_is_left_behind():
    with pytest.raises(UnsafeKernelError), checked():
        launch(_neighbour, (2,), numbers(3))
    launch(_neighbour, (2,), numbers(3))
    with checked() as launches:
        launch(_copy, (1,), numbers(4), torch.zeros(4), 0, 4, BLOCK=4)
    assert len(launches) == 1
