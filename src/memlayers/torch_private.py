"""Every private function of PyTorch that this package calls: why, and what happens in a version that lacks it.

Each name is looked up when it is needed, so importing the package never fails. Where a public name gives the same
answer, only slower, that is the fallback; where none does, training stops with a `RuntimeError`, since a gradient that
is counted twice, or not at all, is worse.

Not here: the methods of `nn.Module` and `torch.optim.Optimizer` that subclasses have always overridden (`_apply`,
`_save_to_state_dict`, `_load_from_state_dict`, the flag `_step_supports_amp_scaling`), and the dictionaries of a module
(`_parameters`, `_buffers`, `_modules`, `_non_persistent_buffers_set`, and those of forward hooks); what PyTorch shows
under a name with an underscore (`_orig_mod` of a compiled module, `_schema` of an operation); `memlayers.lm.footprint`,
whose fake tensors are private as a whole.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch


def current_backward() -> int:
    """The number of the backward pass that this thread runs a part of; -1 outside of any.

    Name: `torch._C._current_graph_task_id`. It tells a recomputation (gradient checkpointing) from a forward pass, and
    keeps the row gradients of nested passes apart. Without it: raises `RuntimeError`, for nothing public tells either.
    """
    try:
        current = torch._C._current_graph_task_id
    except AttributeError:
        raise RuntimeError(
            f"torch {torch.__version__} does not say which backward pass runs (torch._C._current_graph_task_id), "
            f"without which a memory cannot be trained; use a version from 2.9 to 2.13"
        ) from None
    return current()


def after_backward(callback: Callable[[], None]) -> None:
    """Called in a backward pass: calls `callback` when that pass is over.

    Name: `Variable._execution_engine.queue_callback`. It frees the row gradients that a pass computed on the side.
    Without it: does nothing; they stay until the next step or `zero_grad`, uncounted.
    """
    engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
    if hasattr(engine, "queue_callback"):
        engine.queue_callback(callback)


def preserved_versions(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """In it, writing to the tensors does not count as a change of what autograd has saved.

    Name: `torch.autograd._unsafe_preserve_version_counter`. The caller puts the contents back. Without it: the backward
    of a forward pass that was made before raises torch's error of a tensor modified in place.
    """
    preserve = getattr(torch.autograd, "_unsafe_preserve_version_counter", None)
    return nullcontext() if preserve is None else preserve(tuple(tensors))


class WrapperTensor(Tensor):
    """A tensor that has the shape, dtype and device of another and no elements; what it answers, a subclass says.

    Names: `Tensor._make_wrapper_subclass`, and `torch._C._disabled_torch_function_impl`, without which each call would
    be made twice. Without the first: raises `RuntimeError`, for nothing else can stand at a parameter's `.grad`.
    """

    __torch_function__ = getattr(torch._C, "_disabled_torch_function_impl", Tensor.__torch_function__)

    @staticmethod
    def __new__(cls, like: Tensor, *args: Any, **kwargs: Any) -> "WrapperTensor":
        make = getattr(Tensor, "_make_wrapper_subclass", None)
        if make is None:
            raise RuntimeError(
                f"torch {torch.__version__} makes no tensors without elements (Tensor._make_wrapper_subclass), without "
                f"which no row optimizer trains a table; use a version from 2.9 to 2.13"
            )
        return make(cls, like.shape, dtype=like.dtype, device=like.device)


def take_in_lists(kind: type[Tensor]) -> None:
    """Tells `torch.nn.utils` that a subclass of Tensor may be among those that one operation takes as a list.

    Name: `torch.utils._foreach_utils._foreach_supported_types`. Without it: does nothing; whoever clips gradients takes
    each by itself, which is slower.
    """
    known = getattr(getattr(torch.utils, "_foreach_utils", None), "_foreach_supported_types", None)
    if isinstance(known, list) and kind not in known:
        known.append(kind)


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether `register_hook` was called on the parameter.

    Name: `Tensor._backward_hooks`. Without it: False.
    """
    return bool(getattr(parameter, "_backward_hooks", None))


def hooks_after_accumulation(parameter: Tensor) -> dict[Any, Any]:
    """The hooks of `register_post_accumulate_grad_hook`, a dictionary to be emptied and filled again.

    Name: `Tensor._post_accumulate_grad_hooks`. Without it: an empty one; the hooks cannot be set aside.
    """
    return getattr(parameter, "_post_accumulate_grad_hooks", None) or {}


def left_alone_by_ddp(model: nn.Module) -> Iterable[str]:
    """The names of the parameters that a `DistributedDataParallel` around the model will not reduce.

    Name: the attribute `_ddp_params_and_buffers_to_ignore` of the model. Without it: none.
    """
    return getattr(model, "_ddp_params_and_buffers_to_ignore", ())


def leave_alone_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Sets that list; DDP goes through it when it is built.

    Name: the same; `DistributedDataParallel` has a private function that sets it, and marks the parameters, too, which
    copies of a model would keep. Where DDP does not read it, the first step of a row optimizer says so.
    """
    model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


def is_asked_by_grad_scaler() -> bool:
    """Called in a property: whether `torch.amp.GradScaler`, or a class derived from it, reads it.

    Names: `sys._getframe`, by which the property sees who reads it; the module `torch.amp.grad_scaler`. Without them:
    True, which a library that only asks whether there might be a scaler may take amiss.
    """
    try:
        return sys._getframe(2).f_globals.get("__name__") == torch.amp.GradScaler.__module__
    except (AttributeError, ValueError):
        return True


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of the module.

    Names: `Module._forward_hooks`, `Module._forward_pre_hooks`. Without them: True, so that the module is called.
    """
    return bool(getattr(module, "_forward_hooks", True) or getattr(module, "_forward_pre_hooks", True))


def has_global_forward_hooks() -> bool:
    """Whether somebody listens to the calls of all modules.

    Names: `_global_forward_hooks` and `_global_forward_pre_hooks` of `torch.nn.modules.module`. Without them: True.
    """
    home = nn.modules.module
    return bool(getattr(home, "_global_forward_hooks", True) or getattr(home, "_global_forward_pre_hooks", True))


def batch_norm_base() -> type[nn.Module]:
    """What PyTorch's own batch norms are derived from, by which others find them: `update_bn`, FSDP.

    Name: `torch.nn.modules.batchnorm._BatchNorm`. Without it: `nn.Module`; the query's BatchNorm is not found.
    """
    return getattr(nn.modules.batchnorm, "_BatchNorm", nn.Module)


def transforms_are_active() -> bool:
    """Whether a transform of `torch.func` (grad, vjp, jvp, vmap) runs what this thread calls.

    Name: `torch._C._are_functorch_transforms_active`, which `torch.compile` can trace. Without it: True; the caller
    then computes by PyTorch's own operators, which is right, if slower.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active()


def is_in_dual_level() -> bool:
    """Whether there may be dual numbers, of `torch.autograd.forward_ad`.

    Name: `torch.autograd.forward_ad._current_level`. Without it: True; the caller then looks at each tensor.
    """
    return getattr(forward_ad, "_current_level", 0) >= 0


def is_exporting() -> bool:
    """Whether `torch.export` traces what runs.

    Name: `torch.compiler._is_exporting_flag`. Under `torch.compile`, the public `torch.compiler.is_exporting` is always
    True in versions before 2.11, so a compiled table would be trained without its row optimizer. Without it: the public
    one.
    """
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Whether the tensor wraps others and has no elements of its own, as a quantised weight.

    Name: `torch.utils._python_dispatch.is_traceable_wrapper_subclass`. Without it: whether the class has the method
    that such classes must have.
    """
    known = getattr(_python_dispatch, "is_traceable_wrapper_subclass", None)
    return hasattr(tensor, "__tensor_flatten__") if known is None else known(tensor)


def without_compiled_graphs() -> AbstractContextManager[Any]:
    """In it, what is compiled runs as it was written, so that hooks set after its first call are called.

    Name: `torch._dynamo`, whose import takes seconds: where it is not imported, nothing is compiled. Without it: asks
    `torch.compiler`, always.
    """
    if importlib.util.find_spec("torch._dynamo") is not None and "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def starts_matrix_units() -> bool:
    """Asks the operating system for the processor's matrix units (AMX); returns whether this process may use them.

    Names: `_is_amx_tile_supported` and `_init_amx` of `torch.cpu`. Without them: False; products are in float32.
    """
    return all(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_init_amx"))


def dot_in_bags() -> Callable[..., Tensor] | None:
    """The kernel behind `embedding_bag`'s own gradient of its weights.

    Name: `torch.ops.aten._embedding_bag_per_sample_weights_backward`. On a CPU it takes a quarter of the time of a
    product of gathered rows. Without it: None; the caller multiplies gathered rows.
    """
    return getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)


def openmp_parallel() -> Any:
    """The C function `GOMP_parallel(function, argument, threads, flags)` of the OpenMP runtime that PyTorch runs on.

    Name: the file `lib/libtorch_cpu.so`, through which the runtime is found: a second one would have threads of its
    own, spinning against the first's. Without it (macOS, Windows): None; kernels then run on threads of Python's.
    """
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
