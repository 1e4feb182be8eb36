"""MemoryLayer: query, search, weigh, read, combine. Subclasses replace some of these steps.

Letters: B batch, T tokens, D model width, H heads, Q query width of a head, S slots, K rows a head reads,
M = H * K rows a token reads, V value width.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.config import MemoryConfig
from memlayers.keys import FlatKeys, ProductKeys
from memlayers.ops.infer import infer
from memlayers.ops.registry import is_transformed
from memlayers.query import MaskedBatchNorm, QueryNetwork
from memlayers.torch_private import has_forward_hooks, has_global_forward_hooks, is_exporting
from memlayers.values import TablePlace, ValueTable, modules_of

# The parts whose work `infer` does, beside the table. One of another class (wrapped, reparametrised, of a subclass) is
# called.
_PARTS = (QueryNetwork, nn.Linear, MaskedBatchNorm, ProductKeys)

_NO_TORCHSCRIPT = (
    "TorchScript cannot hold a memory layer: use torch.export.export(model, ...) or torch.onnx.export(..., "
    "dynamo=True) in place of torch.jit.trace and torch.jit.script"
)

# The dtypes of x that `infer` has kernels for; elsewhere it would save nothing.
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


class Capturing(threading.local):
    """What runs `infer` by CUDA graphs, for the layers of which a thread wants that: `captured_decoding` says so."""

    def __init__(self) -> None:
        self.of: dict[MemoryLayer, Callable[[MemoryLayer, Tensor, tuple[Any, ...]], Tensor]] = {}


capturing = Capturing()


class MemoryLayer(nn.Module):
    """A large memory m: R^D -> R^D in place of a feed-forward network (Lample et al. 2019, arXiv 1907.05242).

        m(x) = sum over heads h of sum over i in I_h of w_hi * v_i
        I_h = the K slots whose keys k_hi score <q_h(x), k_hi> best, w_h = softmax of these K scores

    q_h is the query network of head h, k_hi its key of slot i, v_i the value of slot i, shared by all heads. With
    product keys the search is exact and costs O(sqrt(S)); a token reads M = H * K of the S rows. A ``value_dim`` that
    differs from ``dim`` adds an output projection.

    A layer of another kind is a subclass that overrides some steps: `make_keys`, `make_values` and `make_output` build
    parts, and `forward` calls `weigh`, `read` and `combine`. It makes further parts after ``super().__init__``.

    Args:
        config: sizes and options.
        values: the table of another layer, to share it; ``config.slots`` rows of width ``config.width``. Or the place
            of a table of its own (`memlayers.MappedFile`, `memlayers.HostMemory`).
        device: of parameters and buffers.
        dtype: of parameters; statistics of the query's norm are in at least float32.

    Raises:
        ValueError: a table of another shape; a place that it cannot have there.
    """

    made: ClassVar[int] = 0  # when the class was defined: tells two of one name apart (`layer_class`)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.made = time.monotonic_ns()

    def __init__(
        self,
        config: MemoryConfig,
        *,
        values: ValueTable | TablePlace | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        where: Any = {"device": device, "dtype": dtype}
        self.query = QueryNetwork(config, **where)
        self.keys = self.make_keys(**where)
        self.owns_values = not isinstance(values, ValueTable)
        if isinstance(values, TablePlace):
            values = self.put_values(values, **where)
        if values is not None and values.shape != (config.slots, config.width):
            raise ValueError(
                f"values must be a table of {config.slots} slots of width {config.width}, "
                f"got {' x '.join(map(str, values.shape))}"
            )
        self.values = self.make_values(**where) if values is None else values
        self.output = self.make_output(**where)

    def make_keys(self, **where: Any) -> ProductKeys | FlatKeys:
        """The module that is called with the query and returns `Hits`; `where` holds the device and the dtype."""
        config = self.config
        if config.keys == "product":
            return ProductKeys(config.heads, config.num_subkeys, config.query_dim, config.topk, **where)
        return FlatKeys(config.heads, config.slots, config.query_dim, config.topk, **where)

    def make_values(self, **where: Any) -> ValueTable:
        """The table, where none is passed in."""
        return ValueTable(self.config.slots, self.config.width, std=self.config.value_std, **where)

    def put_values(self, place: TablePlace, **where: Any) -> ValueTable:
        """The table in a place; a subclass that makes tables of its own kind has none there."""
        if type(self).make_values is not MemoryLayer.make_values:
            raise ValueError(
                f"values must be None or a table for {type(self).__name__}, which makes tables of its own kind, got "
                f"{place!r}"
            )
        return place.make_table(self.config.slots, self.config.width, std=self.config.value_std, **where)

    def make_output(self, **where: Any) -> nn.Module:
        """The projection V -> D of `combine`; the identity where values are as wide as the model."""
        config = self.config
        if config.width == config.dim:
            return nn.Identity()
        return nn.Linear(config.width, config.dim, bias=False, **where)

    def reset_parameters(self) -> None:
        """Initialises as the paper's authors do; skips a table that was passed in, which its own layer initialises.

        Every part resets itself, also those of a subclass. A subclass that holds parameters itself resets them here.
        """
        for part in self.children():
            if part is not self.values or self.owns_values:
                _reset(part)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The memory of each token.

        Args:
            x: [..., D], any leading shape.
            mask: of the leading shape, True or 1 for real tokens. Padding reads nothing (its output is zero), and is
                left out of BatchNorm and of usage. None: all are real.

        Returns:
            [..., D], of the shape and dtype of x.

        Raises:
            ValueError: another width than ``config.dim``, a nested tensor, a mask that does not fit or is one to be
                added, or a call by `torch.jit.trace`.
        """
        if torch.jit.is_tracing():
            raise ValueError(_NO_TORCHSCRIPT)
        config = self.config
        if x.is_nested:
            raise ValueError(
                "x must be a plain tensor, got a nested one, which torch's TransformerEncoder makes of padding in eval "
                "mode: build it with enable_nested_tensor=False"
            )
        if x.ndim == 0 or x.shape[-1] != config.dim:
            raise ValueError(f"x must have dim = {config.dim} as its last size, got {[*x.shape]}")
        mask_T = self.token_mask(x, mask)
        x_TD = x.reshape(-1, config.dim)
        if mask_T is not None:  # selected, not multiplied: NaN in padding must not come through
            x_TD = torch.where(mask_T[:, None], x_TD, 0)
        if (y_TV := try_infer(self, x_TD)) is None:
            query_THQ = self.query(F.dropout(x_TD, config.input_dropout, self.training), mask_T)
            scores_THK, slots_THK = self.keys(F.dropout(query_THQ, config.query_dropout, self.training))
            weights_THK = self.weigh(scores_THK)
            if mask_T is not None:  # padding reads nothing, so that it trains no row
                weights_THK = torch.where(mask_T[:, None, None], weights_THK, 0)
            y_TV = self.read(x_TD, slots_THK, weights_THK)
            y_TV = F.dropout(y_TV, config.value_dropout, self.training)
        elif mask_T is not None:
            y_TV = torch.where(mask_T[:, None], y_TV, 0)
        return self.combine(y_TV.to(x.dtype), x_TD).view(x.shape)

    def weigh(self, scores_THK: Tensor) -> Tensor:
        """The weights of the K slots of each head, of the shape of their scores."""
        return scores_THK.softmax(-1)

    def read(self, x_TD: Tensor, slots_THK: Tensor, weights_THK: Tensor) -> Tensor:
        """y [T, V], in at least float32. x_TD is the input of the layer; it and the weights are zero at padding."""
        return self.values(slots_THK.flatten(1), weights_THK.flatten(1))

    def combine(self, y_TV: Tensor, x_TD: Tensor) -> Tensor:
        """[T, D] from what was read and the input of the layer. Must return zero where both are zero, as at padding."""
        return self.output(y_TV)

    def token_mask(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The mask [T] (bool) that a call with these arguments uses; None if all tokens are real."""
        if mask is None:
            return None
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"mask must have the leading shape of x, {[*x.shape[:-1]]}, got {[*mask.shape]}")
        is_seen = type(mask) is Tensor and not (mask.is_meta or torch.compiler.is_compiling() or is_transformed())
        # Of integers on a GPU the check would make every call wait for it.
        if is_seen and mask.is_signed() and (mask.is_floating_point() or mask.is_cpu) and bool((mask < 0).any()):
            raise ValueError(
                "mask must be True or 1 for real tokens and 0 for padding, got one with numbers below 0, as masks have "
                "that are added to scores: pass mask == 0"
            )
        return mask.reshape(-1).to(torch.bool)

    def __prepare_scriptable__(self) -> NoReturn:
        # `torch.jit.script` asks every module of a model for this.
        raise ValueError(_NO_TORCHSCRIPT)

    def extra_repr(self) -> str:
        return f"slots={self.config.slots}, heads={self.config.heads}, topk={self.config.topk}"


def try_infer(layer: MemoryLayer, x_TD: Tensor) -> Tensor | None:
    """y [T, V] in float32 by `memlayers.ops.infer`: the whole layer up to `combine` as one operation.

    Returns None where the parts compute something else, or as fast; the caller then runs the parts. So it is where
    gradients may be wanted, a part or `weigh` or `read` is not the paper's, somebody listens to a part, or a part keeps
    its weights elsewhere. x and the weights must be of one dtype, float32, bfloat16 or on a GPU also float16; the table
    may be of another. Under autocast to bfloat16 on a CPU float32 weights are cast for this call.
    """
    device, dtype = x_TD.device.type, x_TD.dtype
    if torch.is_grad_enabled() or layer.training or dtype not in _DTYPES.get(device, ()):
        return None
    if is_exporting():
        return None
    is_autocast = torch.is_autocast_enabled(device)
    if has_global_forward_hooks() or (is_autocast and not _casts_itself(device)):
        return None
    query, keys, values = layer.query, layer.keys, layer.values
    norm, projections = query.norm, query.projections
    projection = projections[0]
    for part, kind in zip((query, projection, norm, keys, values), (*_PARTS, type(values)), strict=True):
        # A forward of its own: `accelerate` gives modules one where it keeps their weights on another device.
        if type(part) is not kind or has_forward_hooks(part) or "forward" in part.__dict__:
            return None
    for step, plain in ((layer.weigh, MemoryLayer.weigh), (layer.read, MemoryLayer.read)):
        if getattr(step, "__func__", None) is not plain:
            return None
    if len(projections) > 1 or norm.training or norm.running_mean is None:
        return None
    if not isinstance(values, ValueTable) or (table := values.operands()) is None:
        return None
    stats = norm.running_mean, norm.running_var, norm.weight, norm.bias
    arguments = (projection.weight, projection.bias, *stats, norm.eps, keys.weight, keys.topk, *table)
    for tensor in arguments:
        # A tensor of another class (a quantised weight, say) knows what to do with the operations of a module only.
        if isinstance(tensor, Tensor) and type(tensor) not in (Tensor, nn.Parameter):
            return None
    if is_transformed(x_TD, *arguments):
        return None
    # Under autocast float32 weights are cast for this call: writes through `weight.data` change no version, so a copy
    # that is kept would be of weights that have changed since.
    x_TD = x_TD.bfloat16() if is_autocast else x_TD
    dtypes = (torch.float32, torch.bfloat16) if is_autocast else (dtype,)
    if projection.weight.dtype not in dtypes or keys.weight.dtype != projection.weight.dtype:
        return None
    if not torch.compiler.is_compiling() and (run := capturing.of.get(layer)) is not None:
        return run(layer, x_TD, arguments)
    return infer(x_TD, *arguments)


def _casts_itself(device: str) -> bool:
    """Whether `infer` does what autocast would have the parts do; a compiled graph has the casts of the parts."""
    is_bfloat16 = device == "cpu" and torch.get_autocast_dtype(device) == torch.bfloat16
    return is_bfloat16 and not torch.compiler.is_compiling()


def memory_layers(model: nn.Module) -> dict[str, MemoryLayer]:
    """The memories of a model by their names in it, in the order in which a token meets them."""
    return modules_of(model, MemoryLayer)


def layer_class(name: str) -> type[MemoryLayer]:
    """`MemoryLayer` or its subclass of this name, which a saved description holds; of two, the one defined last.

    Raises `ValueError` for a name that no imported class has.
    """
    known = {kind.__name__: kind for kind in sorted(_kinds(MemoryLayer), key=lambda kind: kind.made)}
    if name not in known:
        raise ValueError(
            f"kind must be the name of a class of memory layers that was imported, got {name!r}; known: "
            f"{', '.join(sorted(known))}. If it is a class of your own, import the module that defines it first"
        )
    return known[name]


def _kinds(kind: type[MemoryLayer]) -> Iterator[type[MemoryLayer]]:
    yield kind
    for subclass in kind.__subclasses__():
        # torch.export makes a class of the same name and module around each layer.
        if not any(base.__module__.startswith("torch.fx.") for base in subclass.__bases__):
            yield from _kinds(subclass)


def _reset(part: nn.Module) -> None:
    reset = getattr(part, "reset_parameters", None)
    if reset is not None:
        reset()
        return
    for child in part.children():  # a container
        _reset(child)
