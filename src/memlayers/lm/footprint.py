"""How much memory a training step needs, before it takes any: `footprint`, counted on tensors without memory.

The run's own model, loss, backward pass and optimizer are run on fake tensors, so what is counted is what the code
does; nothing of the size is allocated, and no random number is drawn. `LiveBytes` follows what lives; what the kernels
allocate inside is written down in `InsideOperations`, by the names of their operations.

Letters: B windows, T tokens of a window, or given to an operation, H heads, Q query width of a head, C = Q / 2,
N sub-keys a codebook, K rows a token, S slots, V width of a value, M entries (slot, weight, token) of all parts.
"""

import contextlib
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from memlayers.available import available_memory, is_lack_of_memory
from memlayers.launch import number
from memlayers.lm.build import batch_loss, build_model, build_optimizer, logits_loss
from memlayers.lm.config import RunConfig
from memlayers.lm.evaluate import ComputePrecision, autocast
from memlayers.lm.table_costs import rows_on_device
from memlayers.ops.read import dot_reference, read_reference
from memlayers.ops.registry import DEVICES
from memlayers.ops.row_step import Step, adam, step_
from memlayers.ops.row_sum import Part, dense_sum
from memlayers.ops.search import CPU_BLOCK, GPU_BLOCK, search_backward_reference, search_reference, token_blocks
from memlayers.sizes import size_text
from memlayers.torch_private import current_backward
from memlayers.values import ValueTable, value_tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENTRY = 28  # bytes of an entry in the kernel that sorts them: two arrays of keys, a weight, an address
# The same on a GPU: key, token and weight as recorded and in order, the order; the sort has as much of its own.
_GPU_ENTRY = 4 + 4 + 4 + 8 + 4 + 4 + 2 * (4 + 8)
_ELSEWHERE = ("in_files", "on_host")  # fields of a footprint that are not where the model is
_GPU_ASIDE = 4096  # blocks of entries there at most, each of which may put the sums of two rows aside


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a training step needs at its peak, by what they are for."""

    parameters: int  # weights and buffers, in float32
    gradients: int  # of all parameters when a step's backward passes are over; recorded rows of value tables
    optimizer_state: int  # what the optimizer keeps between two steps
    activations: int  # all else at the peak: saved for backward, logits, temporaries
    in_files: int = 0  # of tables that are trained in files, and of their states: on the disk
    on_host: int = 0  # of tables that stay on the host of a GPU, of their states and recorded rows

    @property
    def total(self) -> int:
        """The peak, in bytes, where the model is."""
        return self.parameters + self.gradients + self.optimizer_state + self.activations

    @property
    def saved(self) -> int:
        """What a checkpoint of a run has, in bytes."""
        return self.parameters + self.optimizer_state + self.on_host

    def to_dict(self) -> dict[str, int]:
        """All figures, in bytes."""
        elsewhere = {name: size for name in _ELSEWHERE if (size := getattr(self, name))}
        here = {name: size for name, size in asdict(self).items() if name not in _ELSEWHERE}
        return {**here, **elsewhere, "total": self.total}

    def lines(self) -> list[tuple[str, str]]:
        """A table for people: names, and sizes as `size_text` writes them."""
        figures = {name: size for name, size in self.to_dict().items() if name not in _ELSEWHERE}
        return [(name.replace("_", " "), size_text(size)) for name, size in figures.items()]

    def table(self) -> str:
        """The same as one text."""
        width = max(len(name) for name, _ in self.lines())
        return "\n".join(f"  {name:<{width}}  {text:>10}" for name, text in self.lines())


# Of fake tensors `transformers` does not see that no mask is needed, and would make one of windows x context x context.
_ATTENTION = "sdpa_without_mask"
AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)


@functools.lru_cache(maxsize=16)
def footprint(
    config: RunConfig,
    *,
    vocab_size: int,
    precision: ComputePrecision = "fp32",
    device: str = "cpu",
    dense: bool = False,
) -> Footprint:
    """The memory of a training step of `config`, in full swing: the optimizer has its state.

    device: "cpu" or "cuda"; no GPU is needed to ask. dense: as if value tables were trained by AdamW with dense
    gradients. The operators of a GPU are taken to have the shapes of those of a CPU.

    Not counted: what Python, libraries, usage meters and a CUDA context take, and what an allocator loses between
    blocks. On Linux that is little for blocks above 32 MB, but glibc cuts smaller ones from a heap which may grow to
    two or three times what lives in it; MALLOC_MMAP_THRESHOLD_=65536 in the environment prevents that, at the price of
    page faults.
    """
    if device not in DEVICES:
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    # Built outside of the fake mode, where some initialisations want the device that they are for.
    model = build_model(config, vocab_size=vocab_size, eot_id=0, device="meta")
    with contextlib.suppress(ValueError):  # of a base that has an attention of its own, or none
        model.set_attn_implementation(_ATTENTION)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # On the CPU whatever the device: autograd has no fake GPU where there is no real one. The operations of
        # PyTorch have one shape on both; ours are told apart by `LiveBytes`.
        for module in reversed(
            [*model.modules()]
        ):  # each once, which `to_empty` of the whole does not do with shared ones
            module.to_empty(device="cpu", recurse=False)
        model.tie_weights()
        return _count(config, model.train(), precision, device, dense)


def _count(
    config: RunConfig, model: "PreTrainedModel", precision: ComputePrecision, device: str, dense: bool
) -> Footprint:
    if config.training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    dense = dense or config.training.value_optimizer == "dense"
    # SparseAdam has no fake tensors: what it takes beside its moments is as large as what `RowAdam` was handed.
    rows = dataclasses.replace(config, training=dataclasses.replace(config.training, value_optimizer="rows"))
    optimizer = torch.optim.AdamW(model.parameters()) if dense else build_optimizer(rows, model)
    if device == "cuda":  # where AdamW takes all parameters of a group at a time, and so its temporaries
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = True
    weights = list(model.parameters())
    parameters = tensor_bytes([*weights, *model.buffers()])
    accumulate = config.training.accumulate
    inputs_BT = torch.zeros(config.batch_windows // accumulate, config.model.context, dtype=torch.int64)

    loss_of = batch_loss if device == "cpu" else logits_loss  # the model stands on a CPU here, whatever the device

    inside = InsideOperations(model, device)
    live = inside.live
    with _quiet_collector(), live:
        live.hold([*weights, *model.buffers(), inputs_BT])
        for part in range(min(2, accumulate)):
            if part == 1:
                inside.repeat_parts(accumulate - 2)  # those between the first part and the last are like them
            with autocast(torch.device("cpu"), precision):
                loss = loss_of(model, inputs_BT, inputs_BT) / accumulate
            loss.backward()
            del loss
        gradients = tensor_bytes([weight.grad for weight in weights if weight.grad is not None])
        recorded = tensor_bytes(inside.row_gradients)
        peak_of_passes = live.take_peak()
        inside.hand_over()
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        state = tensor_bytes(states)
        peak = max(peak_of_passes + state, live.take_peak())
    activations = peak - parameters - gradients - recorded - state
    is_on_host = config.tables_on_host and device != "cpu" and not dense
    is_elsewhere = is_on_host or (config.tables_in_files and not dense)
    tables = [table.weight for table in value_tables(model)] if is_elsewhere else []
    moments = [value for one in tables for value in optimizer.state[one].values()]
    held = tensor_bytes([*tables, *moments])
    return Footprint(
        parameters=parameters - tensor_bytes(tables),
        gradients=gradients + (0 if is_on_host else recorded),
        optimizer_state=state - tensor_bytes(moments),
        activations=activations + (rows_on_device(config) if is_on_host else 0),
        in_files=0 if is_on_host else held,
        on_host=held + recorded if is_on_host else 0,
    )


def require_memory(
    config: RunConfig,
    *,
    vocab_size: int,
    precision: ComputePrecision = "fp32",
    device: str | torch.device = "cpu",
    dense: bool = False,
    processes: int = 1,
) -> Footprint:
    """The footprint, if it fits what is available on the device; else a `ValueError` with both and with what helps.

    `processes` are those that share the device.
    """
    device = torch.device(device)
    need = footprint(config, vocab_size=vocab_size, precision=precision, device=device.type, dense=dense)
    available = available_memory(device) // processes
    if need.total > available:
        raise ValueError(
            f"a training step needs about {size_text(need.total)} and {size_text(available)} are available on {device}"
            f"{'' if processes == 1 else f' for each of {processes} processes'}:"
            f"\n{need.table()}\n{_advice(config, need)}"
        )
    on_host = available_memory("cpu") // number("LOCAL_WORLD_SIZE")
    if need.on_host > on_host:
        raise ValueError(
            f"tables on the host need about {size_text(need.on_host)} there and {size_text(on_host)} are available to "
            f"a process: lower memory.num_subkeys (now {config.memory.num_subkeys}), or train on a "
            f"CPU with tables in files (memory_values mapped:FOLDER)"
        )
    return need


def explain_out_of_memory(error: BaseException, need: Footprint) -> str | None:
    """What to tell a user whose training ran out of memory; None for any other error."""
    if not is_lack_of_memory(error):
        return None
    return (
        f"out of memory: a training step needs about {size_text(need.total)} for its tensors, as below, and some more "
        f"for libraries and between blocks of memory. Raise training.accumulate, set training.gradient_checkpointing, "
        f"or lower memory.num_subkeys, model.layers or model.dim.\n{need.table()}"
    )


def _advice(config: RunConfig, need: Footprint) -> str:
    """The fields that change the larger share, those that leave the result as it is first."""
    training = config.training
    fields = []
    if training.accumulate < config.batch_windows:
        fields.append(f"raise training.accumulate (now {training.accumulate}, at most {config.batch_windows})")
    if not training.gradient_checkpointing:
        fields.append("set training.gradient_checkpointing")
    sizes = ["model.layers", "model.dim", "data.vocab_size"]
    if config.memory_layers:
        sizes.insert(0, f"memory.num_subkeys (now {config.memory.num_subkeys})")
    smaller = f"lower {', '.join(sizes)}"
    weights_rule = need.activations < need.total / 2
    return "; ".join([smaller, *fields] if weights_rule else [*fields, smaller])


# How it is counted.


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """Within, storages live as long as somebody refers to them, and no longer by chance."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Within, the storages of all tensors that operations return are counted for as long as they live.

    An operation of this package is one step here, whatever it allocates. `inside` says it, by the operation's name: a
    function that is called with its arguments before it, and that allocates the same.
    """

    def __init__(self, inside: Mapping[str, Callable[..., None]]):
        super().__init__()
        self.now = 0
        self._peak = 0
        self._inside = inside
        self._living: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._living.get(storage._cdata)
            if known is not None and known() is storage:
                continue
            size, address = storage.nbytes(), storage._cdata

            def forget(ended: weakref.ref, size: int = size, address: int = address) -> None:
                self.now -= size
                if self._living.get(address) is ended:
                    del self._living[address]

            self._living[address] = weakref.ref(storage, forget)
            self.now += size

    def take_peak(self) -> int:
        """The most bytes that lived at once since the last call."""
        peak, self._peak = self._peak, self.now
        return peak

    def without_data(self, function: Callable[..., Any], *args: Any) -> None:
        """Count what `function` allocates, run on tensors that do not even claim to have data, and forget its result.

        So whatever asks fake tensors of a CPU for their values does not.
        """
        with _disable_current_modes():
            args = tree_map_only(Tensor, _without_data, args)
        function(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "memlayers" and name in self._inside:
            with self:
                self._inside[name](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        # Two gradients of one tensor autograd adds in place, but for fakes: one of the three is about to go.
        if func is not torch.ops.aten.add.Tensor or current_backward() == -1:
            self._peak = max(self._peak, self.now)
        return result


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class InsideOperations:
    """The operations of a model on a device, and the row gradients that they leave behind.

    The kernels' needs are written down below; where there are none the references are run.

    On fake tensors `record_` does not run, and records nothing. What it would keep is kept here, and merged as
    `memlayers.ops.row_gradient.RowGradient` does.
    """

    def __init__(self, model: nn.Module, device: str):
        self._tables = [table for table in value_tables(model) if table.row_gradient is not None]
        self._parts: dict[ValueTable, list[Part]] = {table: [] for table in self._tables}
        self._merged: set[ValueTable] = set()
        has_kernels = DEVICES[device].why_not() is None
        self.live = LiveBytes(
            {"record_": self._record} | (self._kernels(device) if has_kernels else self._references())
        )

    # Row gradients.

    @property
    def row_gradients(self) -> list[Tensor]:
        """All tensors that are recorded."""
        return [factor for parts in self._parts.values() for part in parts for factor in part]

    def repeat_parts(self, times: int) -> None:
        """Record so many times more what is recorded."""
        for table, parts in self._parts.items():
            recorded = list(parts)
            for _ in range(times):
                for part in recorded:
                    self._add(table, Part(*(factor.clone() for factor in part)))

    def hand_over(self) -> None:
        """Give one entry's gradient to each table that has more here, so that its row optimizer's step runs."""
        for table, parts in self._parts.items():
            if parts and table.row_gradient is not None:
                slots_TK, weights_TK, grad_TV = parts[-1]
                table.row_gradient.add(slots_TK[:1, :1].clone(), weights_TK[:1, :1].clone(), grad_TV[:1].clone())

    def _record(self, handle: Tensor, slots_TK: Tensor, weights_TK: Tensor, grad_TV: Tensor) -> None:
        (table,) = (table for table in self._tables if table.row_gradient and table.row_gradient.handle is handle)
        self._add(table, Part(slots_TK.clone(), weights_TK.clone(), grad_TV.clone()))

    def _add(self, table: ValueTable, part: Part) -> None:
        parts = self._parts[table]
        parts.append(part)
        factors = parts[1:] if table in self._merged else parts
        num_slots, width = table.weight.shape
        if sum(factor.size for factor in factors) <= num_slots * width:
            return
        self.live.without_data(dense_sum, factors, num_slots)
        grad_SV = table.weight.new_empty(num_slots, width, dtype=part.grad_TV.dtype)
        slots_S1 = torch.arange(num_slots)[:, None]
        self._parts[table] = [Part(slots_S1, grad_SV.new_empty(num_slots, 1), grad_SV)]
        self._merged.add(table)

    # The kernels of a CPU, and of a GPU.

    def _kernels(self, device: str) -> dict[str, Callable[..., None]]:
        on_cpu = device == "cpu"
        search, search_backward = (_cpu_search, _cpu_search_backward) if on_cpu else (_gpu_search, _gpu_search_backward)
        rows = (lambda entries, _: _ENTRY * entries) if on_cpu else _gpu_rows
        return {
            "search": lambda *given: _scratch(search(*given)),
            "search_backward": lambda *given: _scratch(search_backward(*given)),
            "sum_rows": lambda slots_TK, weights_TK, outputs_TV, _: _scratch(
                rows(slots_TK.numel(), outputs_TV.shape[1])
            ),
            "row_adam_": lambda weight_SV, *_, **__: _scratch(rows(self._entries(weight_SV), weight_SV.shape[1])),
        }

    def _entries(self, weight_SV: Tensor) -> int:
        return sum(part.slots_TK.numel() for part in self._parts_of(weight_SV))

    def _parts_of(self, weight_SV: Tensor) -> list[Part]:
        (parts,) = (parts for table, parts in self._parts.items() if table.weight is weight_SV)
        return parts

    # The references.

    def _references(self) -> dict[str, Callable[..., None]]:
        def by(reference: Callable[..., Any]) -> Callable[..., None]:
            return lambda *args, **kwargs: self.live.without_data(reference, *args)

        return {
            "search": by(search_reference),
            "search_backward": by(search_backward_reference),
            **dict.fromkeys(("read", "read_row_mode"), by(lambda *args: read_reference(*args[:3]))),
            **dict.fromkeys(("dot", "dot_row_mode"), by(lambda *args: dot_reference(*args[:3]))),
            "sum_rows": by(lambda *args: dense_sum([Part(*args[:3])], args[3])),
            "row_adam_": self._row_adam_reference,
        }

    def _row_adam_reference(self, weight_SV: Tensor, *args: Any, **kwargs: Any) -> None:
        def step(weight_SV: Tensor, states: list[Tensor], factors: Any) -> None:
            settings = {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "eps": 1.0}
            step_(Step(adam, weight_SV, tuple(states), [Part(*part) for part in factors], None, -1, settings))

        self.live.without_data(step, weight_SV, list(args[:3]), [list(part) for part in self._parts_of(weight_SV)])


def _scratch(size: int) -> None:
    torch.empty(size, dtype=torch.uint8)


# Bytes that the kernels of an operation allocate.


def _cpu_search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> int:
    size = 4 * _half_scores(query_THQ, weight_2HNC, CPU_BLOCK)
    if query_THQ.dtype != torch.float32:  # may be widened
        size += 4 * (query_THQ.numel() + weight_2HNC.numel())
    return size


def _cpu_search_backward(grad_THK: Tensor, slots_THK: Tensor, query_THQ: Tensor, weight_2HNC: Tensor, *_: bool) -> int:
    num_tokens, heads, topk = grad_THK.shape
    size = 2 * heads * num_tokens * (4 + 8 * topk)
    if query_THQ.dtype != torch.float32:  # widened, and so are their gradients at first
        size += 8 * (query_THQ.numel() + weight_2HNC.numel())
    return size


def _gpu_search(query_THQ: Tensor, weight_2HNC: Tensor, topk: int) -> int:
    return 4 * _half_scores(query_THQ, weight_2HNC, GPU_BLOCK)


def _gpu_search_backward(grad_THK: Tensor, slots_THK: Tensor, query_THQ: Tensor, weight_2HNC: Tensor, *_: bool) -> int:
    # The gradients of half scores; those of the keys in float32, and of one half once more, as a block makes them.
    half_scores = _half_scores(query_THQ, weight_2HNC, GPU_BLOCK)
    return weight_2HNC.element_size() * half_scores + 6 * weight_2HNC.numel()


def _half_scores(query_THQ: Tensor, weight_2HNC: Tensor, block: tuple[int, int]) -> int:
    """Of a block of tokens."""
    _, heads, num_subkeys, _ = weight_2HNC.shape
    return 2 * heads * num_subkeys * token_blocks(len(query_THQ), weight_2HNC, *block)[0].stop


def _gpu_rows(entries: int, width: int) -> int:
    return _GPU_ENTRY * entries + 8 * width * min(_GPU_ASIDE, entries // 32 + 1)
