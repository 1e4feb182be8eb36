"""What a configuration builds: device and precision, the model, its optimizer and schedule, the loss of a batch.

Shapes: B windows, T tokens of a window, C tokens of the vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlayers.experts import Experts
from memlayers.layer import MemoryLayer
from memlayers.lm.config import MemoryKind, Precision, RunConfig, ValueOptimizer
from memlayers.lm.evaluate import ComputePrecision, device_name
from memlayers.lm.retrofit import base_model, places
from memlayers.lm.value_optimizers import DenseValues, SparseValues
from memlayers.memory_plus import MemoryPlus
from memlayers.models import add_memory, causal_lm, freeze_base
from memlayers.models.carriers import FAMILIES
from memlayers.optim import MemoryAdamW
from memlayers.values import TablePlace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS: dict[MemoryKind, type[MemoryLayer]] = {
    "memory": MemoryLayer,
    "memory_plus": MemoryPlus,
    "experts": Experts,
}
OPTIMIZERS: dict[ValueOptimizer, type[MemoryAdamW]] = {
    "rows": MemoryAdamW,
    "dense": DenseValues,
    "sparse": SparseValues,
}
LOGITS_BYTES = 2**22  # of logits that stand in the cache at a time, in float32 on a CPU


def build_model(
    config: RunConfig,
    *,
    vocab_size: int,
    eot_id: int,
    device: str | torch.device = "cpu",
    values: TablePlace | None = None,
) -> "PreTrainedModel":
    """The model of a run with fresh weights, drawn from PyTorch's global generator; ``device="meta"``: shapes only.

    Of a run with a `base` the memories alone are fresh, and are all that requires gradients unless `train_base`.
    values: Where its tables are, if not in memory.
    """
    with torch.device(device):
        if config.base is not None:
            model = base_model(config, is_empty=str(device) == "meta")
        else:
            model = causal_lm(
                config.model.family,
                layers=config.model.layers,
                dim=config.model.dim,
                heads=config.model.heads,
                context=config.model.context,
                vocab_size=vocab_size,
                dropout=config.model.dropout,
                eos_id=eot_id,
            )
        if config.memory_layers:
            add_memory(
                model,
                config.memory,
                layers=config.memory_layers if config.base is None else places(model, config.memory_layers),
                mode=config.memory_mode,
                kind=KINDS[config.memory_kind],
                share_values=config.memory_share_values,
                values=values,
            )
    model.to(device)  # type: ignore[arg-type]  # the companions of value tables, too, which are not made on "meta"
    return freeze_base(model) if config.base_is_frozen else model


def build_optimizer(config: RunConfig, model: "PreTrainedModel") -> MemoryAdamW:
    """The optimizer of a run."""
    training = config.training
    return OPTIMIZERS[training.value_optimizer](
        model,
        lr=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        value_lr=training.value_learning_rate,
        selector_lr=training.selector_learning_rate,
        schedule_values=training.value_schedule == "same",
    )


def build_scheduler(config: RunConfig, optimizer: MemoryAdamW) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rates of a run's steps, each the same share of its peak; values follow if the run says so."""
    from transformers import get_scheduler  # here, since it takes a second to import and `doctor` needs none

    training = config.training
    return get_scheduler(
        "constant_with_warmup" if training.schedule == "constant" else training.schedule,
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=training.steps,
    )


def batch_loss(model: "PreTrainedModel", inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean negative log likelihood in float32. Labels are shifted already: all count.

    In float32 on a CPU the logits of a block of tokens stay in the cache until their gradient is made, and those of the
    whole batch never exist: most of the time of a small model is spent on them. A base of another kind may do more
    than multiply by a matrix (biases, caps), so all of its logits are made.
    """
    on_cpu = model.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    is_plain = model.config.model_type.removeprefix("memory_") in FAMILIES
    if on_cpu and is_plain and hasattr(F, "linear_cross_entropy"):  # since torch 2.13
        hidden_BTD = model.base_model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        weight_CD = model.get_output_embeddings().weight
        block = max(32, LOGITS_BYTES // (weight_CD.element_size() * len(weight_CD)))
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=block, acc_policy="compact")
        return F.linear_cross_entropy(hidden_BTD.flatten(0, 1), weight_CD, labels_BT.flatten(), options=options)
    return logits_loss(model, inputs_BT, labels_BT)


def logits_loss(model: "PreTrainedModel", inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """The same from logits of all tokens at once."""
    logits_BTC = model(input_ids=inputs_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTC.float().flatten(0, 1), labels_BT.flatten())


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_precision(asked: Precision, device: torch.device) -> ComputePrecision:
    """What ``auto`` means on `device`. Raises `ValueError` for a precision that it does not have."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        return "bf16" if bf16 else "fp32"
    if asked == "fp16" and device.type != "cuda":
        raise ValueError(f"training.precision must be auto, fp32 or bf16 on {device.type}, got 'fp16'")
    if asked == "bf16" and device.type == "cuda" and not bf16:
        raise ValueError(f"training.precision must be auto, fp32 or fp16 on {device_name(device)}, got 'bf16'")
    return asked
