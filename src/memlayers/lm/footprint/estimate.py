"""How much memory a training step needs: `footprint`, counted on tensors that have shapes and no memory.

The run's own model, loss, backward pass and optimizer are run on fake tensors, so what is counted is what the code
does; nothing of the size is allocated, and no random number is drawn. What the kernels of a CPU allocate inside is
written down here beside their names.

Shapes: B windows, T tokens of a window, S slots, V width of a value, M entries (slot, weight, token).
"""

import contextlib
import functools
import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from memlayers.available import available_memory, is_lack_of_memory
from memlayers.lm.build import batch_loss, build_model, build_optimizer, logits_loss
from memlayers.lm.config import RunConfig
from memlayers.lm.evaluate import ComputePrecision, autocast
from memlayers.lm.footprint.inside_operations import InsideOperations
from memlayers.lm.footprint.live_bytes import tensor_bytes
from memlayers.sizes import size_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a training step needs at its peak, by what they are for."""

    parameters: int  # weights and buffers, in float32
    gradients: int  # of all parameters when a step's backward passes are over; recorded rows of value tables
    optimizer_state: int  # what the optimizer keeps between two steps
    activations: int  # all else at the peak: saved for backward, logits, temporaries

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return self.parameters + self.gradients + self.optimizer_state + self.activations

    def to_dict(self) -> dict[str, int]:
        """All figures, in bytes."""
        return {**asdict(self), "total": self.total}

    def lines(self) -> list[tuple[str, str]]:
        """A table for people: names, and sizes as `size_text` writes them."""
        return [(name.replace("_", " "), size_text(size)) for name, size in self.to_dict().items()]

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
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    # Built outside of the fake mode, where some initialisations want the device that they are for.
    model = build_model(config, vocab_size=vocab_size, eot_id=0, device="meta")
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
    optimizer = torch.optim.AdamW(model.parameters()) if dense else build_optimizer(config, model)
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
        gradients += tensor_bytes(inside.row_gradients)
        peak_of_passes = live.take_peak()
        inside.hand_over()
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        state = tensor_bytes(states)
        peak = max(peak_of_passes + state, live.take_peak())
    return Footprint(
        parameters=parameters,
        gradients=gradients,
        optimizer_state=state,
        activations=peak - parameters - gradients - state,
    )


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


def require_memory(
    config: RunConfig,
    *,
    vocab_size: int,
    precision: ComputePrecision = "fp32",
    device: str | torch.device = "cpu",
    dense: bool = False,
) -> Footprint:
    """The footprint, if it fits what is available on the device; else a `ValueError` with both and with what helps."""
    device = torch.device(device)
    need = footprint(config, vocab_size=vocab_size, precision=precision, device=device.type, dense=dense)
    available = available_memory(device)
    if need.total > available:
        raise ValueError(
            f"a training step needs about {size_text(need.total)} and {size_text(available)} are available on {device}:"
            f"\n{need.table()}\n{_advice(config, need)}"
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
