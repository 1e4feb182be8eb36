"""When a memory layer is run as one operation (`memlayers.ops.infer`), and that operation as one CUDA graph.

Letters: T tokens, D model width, V value width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memlayers.keys import ProductKeys
from memlayers.ops import gpu
from memlayers.ops.infer import infer
from memlayers.query import MaskedBatchNorm, QueryNetwork
from memlayers.torch_private import has_forward_hooks, has_global_forward_hooks
from memlayers.values import ValueTable

if TYPE_CHECKING:
    from memlayers.layer import MemoryLayer

# What the operation does the work of. A module of another class, a wrapped or a reparametrised one included, is called.
_PARTS = (QueryNetwork, nn.Linear, MaskedBatchNorm, ProductKeys, ValueTable)

# The dtypes of x by device; a CPU's kernel knows one.
_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}

_CAPTURED_ON = ("cuda",)
MOST_CAPTURED = 16  # tokens: what `memlayers.ops.gpu.infer` has kernels for


def try_infer(layer: "MemoryLayer", x_TD: Tensor) -> Tensor | None:
    """y [T, V] in float32, without gradients, of the paper's layer with nobody who listens to its parts.

    x and the weights are of one dtype: float32, on a GPU also 16 bits; the table's is its own. A subclass has it, too,
    where it differs in `combine` alone. None otherwise: then the parts are to be called.
    """
    device, dtype = x_TD.device.type, x_TD.dtype
    if torch.is_grad_enabled() or layer.training or dtype not in _DTYPES.get(device, ()):
        return None
    if has_global_forward_hooks() or torch.is_autocast_enabled(device):
        return None
    query, keys, values = layer.query, layer.keys, layer.values
    norm, projections = query.norm, query.projections
    projection = projections[0]
    for part, kind in zip((query, projection, norm, keys, values), _PARTS, strict=True):
        # Hooks, or a forward of its own: `accelerate` gives modules one where it moves their weights.
        if type(part) is not kind or has_forward_hooks(part) or "forward" in part.__dict__:
            return None
    if len(projections) > 1 or norm.training or not layer.reads_plainly():
        return None
    stats = norm.running_mean, norm.running_var, norm.weight, norm.bias
    arguments = (projection.weight, projection.bias, *stats, norm.eps, keys.weight, keys.topk, values.weight)
    for tensor in arguments:
        # A tensor of another class (a quantised weight, say) knows what to do with the operations of a module only.
        if isinstance(tensor, Tensor) and type(tensor) not in (Tensor, nn.Parameter):
            return None
    if projection.weight.dtype != dtype or keys.weight.dtype != dtype:
        return None
    if not torch.compiler.is_compiling() and (captures := vars(layer).get("captures")) is not None:
        return captures.infer(layer, x_TD, arguments)
    return infer(x_TD, *arguments)


@contextmanager
def captured_decoding(model: nn.Module, *, tokens: int = 1) -> Iterator[None]:
    """In it, the memory layers of `model` answer calls of at most `tokens` tokens by replaying a CUDA graph.

        with torch.inference_mode(), captured_decoding(model):
            model.generate(**prompt)

    For one token at a time, starting the kernels takes longer than their work. A layer that runs as one operation on a
    GPU (`try_infer`) is captured at its first such call, for each number of tokens and dtype, and again where a weight
    has been replaced by another tensor; weights that change in place need nothing. Nothing is captured on a CPU, under
    `torch.compile`, or inside a capture of somebody else's: there the call is as usual. Call the model on one stream at
    a time. At the end, graphs and their memory are given back.

    Raises `ValueError` unless `tokens` is an integer from 1 to 16.
    """
    from memlayers.layer import memory_layers

    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MOST_CAPTURED:
        raise ValueError(f"tokens must be an integer from 1 to {MOST_CAPTURED}, got {tokens!r}")
    captures = Captures(tokens)
    layers = memory_layers(model).values()
    before = [vars(layer).get("captures") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["captures"] = captures
        yield
    finally:
        for layer, outer in zip(layers, before, strict=True):
            if outer is None:
                vars(layer).pop("captures", None)
            else:
                vars(layer)["captures"] = outer


class Captures:
    """The CUDA graphs of the layers of one model; a copy of a layer has none."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self._calls: dict[tuple[Any, ...], tuple[list[Any], CapturedCall | None]] = {}
        # Shared: each stream has a workspace of cuBLAS of some 30 MB, and of the layers one runs at a time.
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: Any = None

    def infer(self, layer: "MemoryLayer", x_TD: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """`memlayers.ops.infer.infer`, by a graph where there can be one."""
        if x_TD.device.type not in _CAPTURED_ON or not 1 <= len(x_TD) <= self.tokens:
            return infer(x_TD, *arguments)
        if torch.cuda.is_current_stream_capturing():  # it becomes a part of that graph
            return infer(x_TD, *arguments)
        key = id(layer), x_TD.device, x_TD.dtype, len(x_TD)
        identity = [_identity(argument) for argument in arguments]
        captured_of, call = self._calls.get(key, (None, None))
        if captured_of != identity:
            self._calls.pop(key, None)
            call = None  # its memory is free for the next
            call = self._capture(x_TD, arguments)
            self._calls[key] = identity, call
        return infer(x_TD, *arguments) if call is None else call(x_TD)

    def _capture(self, x_TD: Tensor, arguments: tuple[Any, ...]) -> "CapturedCall | None":
        kernels = gpu.kernels("infer")
        if kernels is None or not kernels.takes(x_TD, *arguments):
            return None  # the reference copies from the host, which no graph can
        with torch.cuda.device(x_TD.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream = self._streams.get(x_TD.device)
            if stream is None:
                stream = self._streams[x_TD.device] = torch.cuda.Stream(x_TD.device)
            return CapturedCall(x_TD, arguments, stream, self._pool)

    def __reduce__(self):
        return type(None), ()


class CapturedCall:
    """One call of `infer` as a CUDA graph, with the memory where it finds x and leaves y."""

    def __init__(self, x_TD: Tensor, arguments: tuple[Any, ...], stream: torch.cuda.Stream, pool: Any):
        # Not a tensor of inference mode: those cannot be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._x_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format).copy_(x_TD)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                infer(self._x_TD, *arguments)  # Triton compiles and cuBLAS takes its workspace, which no graph can
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # What other threads do with the device meanwhile is no error.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._y_TV = infer(self._x_TD, *arguments)

    def __call__(self, x_TD: Tensor) -> Tensor:
        self._x_TD.copy_(x_TD)
        self._graph.replay()
        return self._y_TV.clone()  # the next call writes over it


def _identity(argument: Any) -> Any:
    """What a graph was captured of: where a tensor is and how it lies there; a number itself."""
    if isinstance(argument, Tensor):
        return argument.data_ptr(), argument.dtype, argument.shape, argument.stride()
    return argument
