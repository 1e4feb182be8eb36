"""Every operation: what it takes and gives, and what computes it where. The file to read first.

Each operation has a reference in PyTorch's own operations, which runs anywhere, and kernels for a CPU (`cpu`, in Numba)
and for a GPU (`gpu`, in Triton). A function of kernels takes the arguments of the operation, or what `operation` was
told to pack them into, and returns NotImplemented for dtypes or sizes that it does not know: then the reference runs.
References, gradients and fakes are in the file of the operation, which registers them by `operation`.

Letters: T tokens, H heads, Q query width of a head, C = Q / 2, N sub-keys a codebook, S slots, K rows that a head reads
or, in a table's operations, a token, V value width, D model width, F = H * Q.
"""

import functools
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memlayers.after_import import after_import
from memlayers.ops import cpu, gpu
from memlayers.ops.cpu import launch
from memlayers.torch_private import is_in_dual_level, transforms_are_active


class Operation(NamedTuple):
    """A line of `OPERATIONS`. kernels: module and function in `cpu` and `gpu`, with the dtypes that each knows.

    gpu: Empty where there is no kernel for a GPU.
    is_slow: On a CPU the reference takes over 10 times as long as the kernel (docs/performance.md).
    """

    schema: str
    kernels: str | None = None
    cpu: str = ""
    gpu: str = ""
    is_slow: bool = False


_16 = "float32, bfloat16, float16"
_TABLES = f"tables in {_16}"
_INTEGERS = "rows of 8 and 4 bits"
_STEPS: Any = {"kernels": "rows.step_", "cpu": _TABLES, "gpu": _TABLES, "is_slow": True}
_FACTORS = "Tensor[] slots, Tensor[] weights, Tensor[] grads"
_HOW = "float? max_norm=None, int seed=-1, int first_column=0, Tensor? norm=None"

OPERATIONS = {
    # From queries to the best slots.
    "search": Operation(
        "(Tensor query_THQ, Tensor weight_2HNC, int topk) -> (Tensor, Tensor)", "search.search", _16, _16
    ),
    "search_backward": Operation(
        "(Tensor grad_THK, Tensor slots_THK, Tensor query_THQ, Tensor weight_2HNC, bool of_query=True, "
        "bool of_weight=True) -> (Tensor, Tensor)",
        "search.search_backward",
        _16,
        _16,
    ),
    "select": Operation(
        "(Tensor first_N, Tensor second_N, int topk) -> (Tensor, Tensor)", "select.select", _16, _16, True
    ),
    # From slots to the output, and back.
    "read": Operation(
        "(Tensor table_SV, Tensor slots_TK, Tensor weights_TK, Tensor? mark_1=None) -> Tensor",
        "read.read",
        _TABLES,
        _TABLES,
    ),
    "read_row_mode": Operation(
        "(Tensor table_SV, Tensor slots_TK, Tensor weights_TK, Tensor mark_1, Tensor log) -> Tensor",
        "read.read",
        _TABLES,
        _TABLES,
    ),
    "dot": Operation(
        "(Tensor table_SV, Tensor slots_TK, Tensor outputs_TV, Tensor? mark_1=None) -> Tensor",
        "read.dot",
        _TABLES,
        _TABLES,
    ),
    "dot_row_mode": Operation(
        "(Tensor table_SV, Tensor slots_TK, Tensor outputs_TV, Tensor mark_1, Tensor log) -> Tensor",
        "read.dot",
        _TABLES,
        _TABLES,
    ),
    "read_low_bits": Operation(
        "(Tensor codes_SR, Tensor scales_S, Tensor slots_TK, Tensor weights_TK, int width, int bits) -> Tensor",
        "low_bits.read",
        _INTEGERS,
    ),
    "dot_low_bits": Operation(
        "(Tensor codes_SR, Tensor scales_S, Tensor slots_TK, Tensor outputs_TV, int bits) -> Tensor",
        "low_bits.dot",
        _INTEGERS,
    ),
    "sum_rows": Operation(
        "(Tensor slots_TK, Tensor weights_TK, Tensor outputs_TV, int num_slots) -> Tensor", "rows.sum_rows", _16, _16
    ),
    # From backward to the optimizer.
    "record_": Operation("(Tensor(a!) handle, Tensor slots_TK, Tensor weights_TK, Tensor grad_TV) -> ()"),
    "row_norm": Operation(f"({_FACTORS}, int num_slots) -> Tensor", "rows.row_norm", _16, _16, True),
    "row_adam_": Operation(
        f"(Tensor(a!) table_SV, Tensor(b!) exp_avg_SV, Tensor(c!) exp_avg_sq_SV, Tensor(d!) steps_S, {_FACTORS}, "
        f"float lr, float beta1, float beta2, float eps, {_HOW}) -> ()",
        **_STEPS,
    ),
    "row_adagrad_": Operation(
        f"(Tensor(a!) table_SV, Tensor(b!) square_sum, {_FACTORS}, float lr, float eps, {_HOW}) -> ()",
        **_STEPS,
    ),
    "row_sgd_": Operation(f"(Tensor(a!) table_SV, {_FACTORS}, float lr, {_HOW}) -> ()", **_STEPS),
    # A whole layer.
    "infer": Operation(
        "(Tensor x_TD, Tensor projection_FD, Tensor? bias_F, Tensor mean_HQ, Tensor var_HQ, Tensor gain_HQ, "
        "Tensor shift_HQ, float eps, Tensor keys_2HNC, int topk, Tensor table_SV, "
        "Tensor? scales_S=None, int bits=0, int width=0) -> Tensor",
        "infer.infer",
        f"float32, bfloat16, {_TABLES}, {_INTEGERS}",
        _16,
    ),
}

# The kernels of each of PyTorch's devices.
DEVICES: dict[str, ModuleType] = {"cpu": cpu, "cuda": gpu}

references: dict[str, Callable[..., Any]] = {}
# By operation, what computes it by PyTorch's own operators, for derivatives of any kind (`memlayers.ops.exported`).
compositions: dict[str, Callable[..., Any]] = {}
_LOG = logging.getLogger("memlayers")
_MANY = 2**20  # elements of the tensors of a call, from which on it is said that it is slow
_packings: dict[str, Callable[..., tuple[Any, ...]]] = {}
# Not `torch.library.custom_op`, whose wrappers cost more than the arithmetic of one token.
_library = torch.library.Library("memlayers", "FRAGMENT")


def operation(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    pack: Callable[..., tuple[Any, ...]] | None = None,
    flops: Callable[..., int] | None = None,
    batched: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers an operation of `OPERATIONS`; returns it.

    Args:
        name: Of the operation.
        reference: What computes it where there are no kernels.
        fake: What it returns, without data.
        backward: Its gradients, as `torch.library.register_autograd` takes them.
        save: What backward needs is saved by it.
        pack: From the arguments of the operation those of reference and kernels; they are the same without it.
        flops: Floating-point operations, from the arguments with shapes in place of tensors.
        batched: What stands in for it under `vmap`, as of `is_grads_batched`; PyTorch's loop without it.
    """
    references[name] = reference
    if pack is not None:
        _packings[name] = pack
    _library.define(name + OPERATIONS[name].schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, partial(run, None, name), "CompositeExplicitAutograd")
    for device in DEVICES:
        _library.impl(name, partial(run, device, name), device.upper())
    if batched is not None:
        for key in ("Batched", "FuncTorchBatched"):  # `torch.autograd` has a `vmap` of its own
            _library.impl(name, batched, key)
    torch.library.register_fake(f"memlayers::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"memlayers::{name}", backward, setup_context=save, lib=_library)
    packet = getattr(torch.ops.memlayers, name)
    if flops is not None:
        # PyTorch's counter takes 0.2 s to import, for it imports Triton.
        after_import("torch.utils.flop_counter", lambda counter: counter.register_flop_formula(packet)(flops))
    overload = packet.default
    if backward is None:
        return overload

    def differentiable(*arguments: Any, **keywords: Any) -> Any:
        if is_transformed(*arguments):
            return compositions[name](*arguments, **keywords)
        return overload(*arguments, **keywords)

    return differentiable


def is_transformed(*inputs: Any) -> bool:
    """Whether derivatives are taken of these inputs that an operation has no rules for.

    So it is in the transforms of `torch.func` and where a tensor is a dual number. An operation would have a tangent of
    zero there.
    """
    if transforms_are_active():
        return True
    if not is_in_dual_level():
        return False
    tensors = (given for given in inputs if isinstance(given, Tensor))
    return torch.compiler.is_compiling() or any(forward_ad.unpack_dual(one).tangent is not None for one in tensors)


def run(device: str | None, name: str, *arguments: Any, **keywords: Any) -> Any:
    """Computes an operation by the kernels of a device where they know how to, by its reference otherwise."""
    given = _packings[name](*arguments, **keywords) if name in _packings else arguments
    written = arguments[: OPERATIONS[name].schema.count("!")]  # those that are written to come first
    if not written:
        return _compute(device, name, given)
    with torch.no_grad():
        _compute(device, name, given)
    # Kernels write where autograd does not see it; a backward that needs what was there before must raise.
    torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])
    return None


def _compute(device: str | None, name: str, given: tuple[Any, ...]) -> Any:
    _, where, _, on_gpu, _ = OPERATIONS[name]
    if device is not None and where is not None and (device == "cpu" or on_gpu):
        module, function = where.split(".")
        kernels = DEVICES[device].kernels(module)
        result = NotImplemented if kernels is None else getattr(kernels, function)(*given)
        if result is not NotImplemented:
            return result
        if device == "cpu" and OPERATIONS[name].is_slow:
            _say_that_it_is_slow(name, given)
    return references[name](*given)


def _say_that_it_is_slow(name: str, given: tuple[Any, ...]) -> None:
    """Logs it, once an operation and cause, where there is so much to do that it matters."""
    if cpu.is_switched_off() or _elements(given) < _MANY:
        return
    remedy = f"its kernel takes {OPERATIONS[name].cpu}, all contiguous"
    if (why_not := cpu.why_not()) is not None:
        remedy = f"{why_not}; `memlayers info` says what else has no kernel"
    _log_once(f"{name} runs on its reference, which takes over 10 times as long as its kernel: {remedy}")


def _elements(given: Any) -> int:
    if isinstance(given, Tensor):
        return given.numel()
    return sum(map(_elements, given)) if isinstance(given, list | tuple) else 0


@functools.cache
def _log_once(message: str) -> None:
    _LOG.warning(message)


def describe() -> dict[str, str]:
    """By operation: what computes it on a CPU and on a GPU, for which dtypes, or why the reference does.

    And for which processors the kernels for a CPU are compiled, and on which threads they run.
    """
    found = {}
    for name, (_, where, on_cpu, on_gpu, is_slow) in OPERATIONS.items():
        if where is None:
            continue
        if is_slow:
            on_cpu += "; PyTorch for others, over 10 times slower"
        runs = (
            ("CPU", "Numba", cpu.why_not(), on_cpu),
            ("GPU", "Triton", gpu.why_not() if on_gpu else "it has no kernel there", on_gpu),
        )
        found[name] = ", ".join(
            f"{kernels} on a {device} ({dtypes})" if why_not is None else f"PyTorch on a {device} ({why_not})"
            for device, kernels, why_not, dtypes in runs
        )
    if cpu.why_not() is None:
        found["kernels for a CPU"] = cpu.variant()
        found["threads of a CPU"] = launch.what_threads()
    return found
