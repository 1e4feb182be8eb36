"""What the GPU's kernels are compiled to, without a GPU: all launches of an operation, at the paper's or odd sizes.

Tensors are on "meta", so tables have their full size. The interpreter shows that kernels are right; only the compiler
shows that they are typed, that nothing is spilled, and that rows are loaded 16 bytes a thread.
"""

import importlib
import importlib.util
import os
from functools import partial

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs Triton, and a process in which it does not interpret", allow_module_level=True)

import triton
import triton.language as tl

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    pytest.skip("kernel_tools needs Triton 3.6 or later", allow_module_level=True)

from kernel_tools.compiled import GFX942, SM_80, SM_90, Compiled, Launch, compile_launch, parse_sass, recorded
from memlayers.ops import gpu
from memlayers.ops.gpu.launch import launch
from memlayers.ops.registry import run

importlib.import_module("memlayers.ops.row_step")  # says how the arguments of a step are packed
on_gpu = partial(run, "cuda")  # the name of an operation, and its arguments

# T tokens, H heads, K neighbours, N sub-keys, V width, C half of a head's query.
PAPER = {"T": 4096, "H": 4, "K": 32, "N": 1024, "V": 1024, "C": 256}
FEW = PAPER | {"T": 1}
ODD = {"T": 77, "H": 3, "K": 5, "N": 301, "V": 67, "C": 19}
ONES = dict.fromkeys(PAPER, 1)  # an argument of 1 is a constant to the compiler, and has no methods
MANY_ROWS = {"T": 4096, "H": 8, "K": 100, "N": 4096, "V": 1000, "C": 64}
MANY_KEYS = {"T": 4096, "H": 8, "K": 32, "N": 65536, "V": 1000, "C": 64}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _compiled_anew(tmp_path, monkeypatch):
    """Nothing is taken from the user's cache, or left there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def table_and_states(rule, S, V, dtype, state_dtype=torch.float32):
    states = {
        "adam": [meta(S, V, dtype=state_dtype), meta(S, V, dtype=state_dtype), meta(S, dtype=torch.int32)],
        "adagrad": [meta(S, V, dtype=state_dtype)],
        "row adagrad": [meta(S)],
        "sgd": [],
    }
    return [meta(S, V, dtype=dtype), *states[rule]]


STEPS = {
    "adam": partial(on_gpu, "row_adam_", beta1=0.9, beta2=0.999, eps=1e-8),
    "adagrad": partial(on_gpu, "row_adagrad_", eps=1e-8),
    "row adagrad": partial(on_gpu, "row_adagrad_", eps=1e-8),
    "sgd": partial(on_gpu, "row_sgd_"),
}


def row_step(rule, sizes, dtype, state_dtype=torch.float32, grad_dtype=torch.float32):
    T, H, K, N, V, _ = sizes.values()
    wholes = table_and_states(rule, N * N, V, dtype, state_dtype)
    factors = [meta(T, H * K, dtype=torch.int64)], [meta(T, H * K)], [meta(T, V, dtype=grad_dtype)]
    is_rounded = any(whole.dtype == torch.bfloat16 for whole in wholes)
    STEPS[rule](*wholes, *factors, lr=1e-3, max_norm=0.5, seed=12345 if is_rounded else -1)


def call(operation, sizes, dtype):
    """An operation on tensors of these sizes."""
    T, H, K, N, V, C = sizes.values()
    slots, weights, outputs = meta(T, H * K, dtype=torch.int64), meta(T, H * K), meta(T, V)
    query, keys, table = meta(T, H, 2 * C, dtype=dtype), meta(2, H, N, C, dtype=dtype), meta(N * N, V, dtype=dtype)
    if operation == "select":
        on_gpu("select", *(meta(H, T, N, dtype=dtype) for _ in range(2)), K)
    elif operation == "search":
        on_gpu("search", query, keys, K)
    elif operation == "search backward":
        on_gpu("search_backward", meta(T, H, K), meta(T, H, K, dtype=torch.int64), query, keys)
    elif operation == "read":
        on_gpu("read", table, slots, weights)
    elif operation == "dot":
        on_gpu("dot", table, slots, outputs)
    elif operation == "sum of rows":
        on_gpu("sum_rows", slots, weights, outputs.to(dtype), N * N)
    elif operation == "norm":
        on_gpu("row_norm", [slots], [weights], [outputs.to(dtype)], N * N)
    elif operation == "infer":
        of_query = [meta(H, 2 * C, dtype=dtype) for _ in range(4)]
        x, projection, bias = meta(T, 128, dtype=dtype), meta(H * 2 * C, 128, dtype=dtype), meta(H * 2 * C, dtype=dtype)
        on_gpu("infer", x, projection, bias, *of_query, 1e-5, keys, K, table)
    else:
        row_step(operation, sizes, dtype)


def compiled_for(target, *arguments, function=call) -> list[Compiled]:
    """Every kernel that a call launches, once."""
    with recorded() as launches:
        function(*arguments)
    assert launches, "the reference was used"
    return [compile_launch(launch, target) for launch in {describe(launch): launch for launch in launches}.values()]


def describe(launch: Launch) -> str:
    arguments = [given.dtype if isinstance(given, torch.Tensor) else type(given) for given in launch.arguments]
    return f"{launch.name} {arguments} {launch.settings}"


def check(kernels):
    for kernel in kernels:
        assert kernel.instructions, kernel
        assert kernel.spilled_bytes == kernel.local_accesses == 0, str(kernel)
    return {kernel.name: kernel for kernel in kernels}


OPERATIONS = ["select", "search", "search backward", "read", "dot", "sum of rows", "norm", "infer", *STEPS]
# Loads of 16 bytes that a kernel must have, at the paper's sizes.
WIDE_LOADS = {"_read_kernel": 8, "_dot_kernel": 8, "_walk": 2, "_finish": 2, "_half_scores_kernel": 8}
CASES = [
    ("select", PAPER, "fp32"),
    ("read", PAPER, "bf16"),
    ("dot", PAPER, "bf16"),
    pytest.param("adam", PAPER, "bf16", marks=pytest.mark.slow),
    pytest.param("search backward", PAPER, "bf16", marks=pytest.mark.slow),
    pytest.param("infer", FEW, "bf16", marks=pytest.mark.slow),
]
SIZES = {"paper": PAPER, "few": FEW, "odd": ODD, "ones": ONES, "many rows": MANY_ROWS, "many keys": MANY_KEYS}


def case_id(value):
    names = [name for name, sizes in SIZES.items() if sizes == value]
    return names[0] if names else str(value)


@pytest.mark.parametrize(("operation", "sizes", "dtype"), CASES, ids=case_id)
def test_nothing_is_spilled_and_rows_are_loaded_16_bytes_a_thread(operation, sizes, dtype):
    kernels = check(compiled_for(SM_90, operation, sizes, DTYPES[dtype]))
    for name in kernels.keys() & WIDE_LOADS.keys():
        assert kernels[name].loads_of_16_bytes >= WIDE_LOADS[name] // kernels[name].warps, str(kernels[name])


@pytest.mark.slow
@pytest.mark.parametrize("target", [SM_80, SM_90, GFX942], ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_compiles_for_every_gpu(operation, sizes, dtype, target):
    if operation == "infer" and sizes not in ("few", "ones"):
        pytest.skip("many tokens take other operations")
    kernels = check(compiled_for(target, operation, SIZES[sizes], DTYPES[dtype]))
    if sizes == "paper" and target.backend == "cuda":
        for name in kernels.keys() & WIDE_LOADS.keys():
            assert kernels[name].loads_of_16_bytes, str(kernels[name])


@pytest.mark.slow
@pytest.mark.parametrize("target", [SM_80, SM_90, GFX942], ids=lambda target: str(target.arch))
@pytest.mark.parametrize("rule", STEPS)
@pytest.mark.parametrize(("state_dtype", "grad_dtype"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_and_gradients_in_16_bits(rule, dtype, state_dtype, grad_dtype, target):
    dtypes = (DTYPES[name] for name in (dtype, state_dtype, grad_dtype))
    check(compiled_for(target, rule, PAPER, *dtypes, function=row_step))


@triton.jit(do_not_specialize=["any_size"])
def _copy(x, y, optional, size, any_size, factor, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    copied = tl.load(x + place, mask=place < size)
    if optional is not None:
        copied += tl.load(optional)
    tl.store(y + place, copied * factor, mask=place < any_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "size", "any_size", "is_wide"),
    [(0, 1024, 1024, True), (4, 1024, 1024, True), (1, 1024, 1024, False), (0, 1022, 1024, False), (0, 1, 1024, False)],
)
def test_a_launch_is_specialized_as_triton_would(begin, size, any_size, is_wide):
    """What is aligned, and masked by a multiple of 16, is loaded 16 bytes a thread; not what is excepted."""
    with recorded() as launches:
        launch(_copy, (3, 2), meta(2048)[begin:], meta(2048), None, size, any_size, 0.5, BLOCK=1024, num_warps=2)
    assert launches[0].programs == 6
    kernel = compile_launch(launches[0], SM_90)
    assert kernel.warps == 2
    assert (kernel.loads_of_16_bytes > 0) == is_wide, str(kernel)
    assert kernel.stores_of_16_bytes == 0, str(kernel)


def test_nothing_is_run_or_left_behind():
    with recorded() as launches:
        # 17 GB, and more than 2**31 elements.
        on_gpu("read", meta(2**21, 2048), meta(7, 3, dtype=torch.int64), meta(7, 3))
    (found,) = launches
    assert found.name == "_read_kernel"
    assert found.arguments[0].shape == (2**21, 2048)
    with recorded() as others:
        pass
    assert not others
    assert gpu.why_not() is None


def test_jumps_are_found():
    names, jumps = parse_sass(
        """
        .L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        .L_x_1:
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        .L_x_2:
        /*0040*/                   EXIT ;
        .L_x_3:
        /*0050*/                   BRA `(.L_x_3) ;
        /*0060*/                   NOP ;
        """
    )
    assert names == ("MOV", "BRA", "LDG.E.128", "BRA", "EXIT")
    assert jumps == ((1, 4), (3, 2))
