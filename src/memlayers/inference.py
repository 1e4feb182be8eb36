"""captured_decoding: the memory layers of a model as CUDA graphs, for one token at a time.

Letters: T tokens, D model width, V value width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memlayers.checks import require_int
from memlayers.layer import MemoryLayer, capturing, memory_layers
from memlayers.ops import gpu
from memlayers.ops.infer import Layer, infer

_CAPTURED_ON = ("cuda",)
MOST_CAPTURED = 16  # tokens: what `memlayers.ops.gpu.infer` has kernels for


@contextmanager
def captured_decoding(model: nn.Module, *, tokens: int = 1) -> Iterator[None]:
    """In its block, the memory layers of a model answer calls of few tokens by replaying a CUDA graph.

        with torch.inference_mode(), captured_decoding(model):
            model.generate(**prompt)

    For one token at a time, starting the kernels takes longer than their work. A layer that runs as one operation on a
    GPU (`memlayers.layer.try_infer`) is captured at its first such call, for each number of tokens and dtype, and again
    when a weight has been replaced by another tensor; a weight that changes in place needs nothing. On a CPU, under
    `torch.compile` and inside a capture of somebody else's nothing is captured: there the call runs as usual. The end
    of the block frees the graphs and their memory.

    Args:
        model: what holds the memories. Call it on one stream at a time. Calls by other threads run as usual.
        tokens: the most tokens of a call that is captured, 1 to 16.

    Raises:
        ValueError: another number of tokens.
    """
    require_int("tokens", tokens, least=1, most=MOST_CAPTURED)
    before = capturing.of
    capturing.of = {**before, **dict.fromkeys(memory_layers(model).values(), CapturedCalls(tokens))}
    try:
        yield
    finally:
        capturing.of = before


class CapturedCalls:
    """The CUDA graphs of the layers of one model, for the calls of one thread."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self._calls: dict[tuple[Any, ...], tuple[list[Any], CapturedCall | None]] = {}
        # Shared: each stream has a workspace of cuBLAS of some 30 MB, and of the layers one runs at a time.
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: Any = None

    def __call__(self, layer: MemoryLayer, x_TD: Tensor, arguments: tuple[Any, ...]) -> Tensor:
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
        if kernels is None or not kernels.takes(Layer(x_TD, *arguments)):
            return None  # the reference copies from the host, which no graph can
        with torch.cuda.device(x_TD.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream = self._streams.get(x_TD.device)
            if stream is None:
                stream = self._streams[x_TD.device] = torch.cuda.Stream(x_TD.device)
            return CapturedCall(x_TD, arguments, stream, self._pool)


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
