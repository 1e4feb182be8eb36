"""share: what one of several processes has of a run: its windows, its draws, its replica of the model.

Letters: B windows, T tokens of a window.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memlayers.distributed.processes import Processes
from memlayers.distributed.wrapping import keep_out_of_ddp
from memlayers.launch import number
from memlayers.lm.build import batch_loss
from memlayers.lm.config import RunConfig
from memlayers.lm.data import Corpus, DataConfig, prepare
from memlayers.torch_private import leave_alone_in_ddp

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def share_of(config: RunConfig, size: int) -> RunConfig:
    """The configuration with the batch of one of as many processes.

    Raises `ValueError` if they cannot share each part of a step evenly.
    """
    if size > 1 and config.tables_in_files:
        raise ValueError(
            f"memory_values must be 'memory' or 'host' for several processes, got {config.memory_values!r}: a table in "
            f"files is trained by one process"
        )
    training = config.training
    windows = config.batch_windows // training.accumulate
    if windows % size:
        raise ValueError(
            f"training.batch_tokens / training.accumulate must be a multiple of {size} windows of "
            f"model.context = {config.model.context} for as many processes, got {windows}: change the batch, or start "
            f"a number of processes that divides it"
        )
    batch_tokens = training.batch_tokens // size
    return dataclasses.replace(config, training=dataclasses.replace(training, batch_tokens=batch_tokens))


def number_on(device: torch.device, processes: Processes) -> int:
    """How many of the processes share a device: those of one machine its memory, none a GPU."""
    return min(processes.size, number("LOCAL_WORLD_SIZE")) if device.type == "cpu" else 1


def order_of_share(order: np.ndarray, windows: int, processes: Processes) -> np.ndarray:
    """Those of the ordered windows that a process reads, `windows` of each part: parts are cut by rank.

    So the windows of a part are the same ones for every number of processes.
    """
    return order.reshape(-1, processes.size, windows)[:, processes.rank].reshape(-1)


def seed_of_rank(seed: int, processes: Processes) -> int:
    """The seed of what a process draws, as dropout: that of the run at rank 0, others at the others."""
    return int(np.random.SeedSequence([seed, processes.rank]).generate_state(1)[0]) if processes.rank else seed


def prepared_by_first(data: DataConfig, folder: "str | Path", processes: Processes, *, progress: bool) -> Corpus:
    """The corpus of a folder, which rank 0 prepares while the others wait."""
    with processes.together():
        if processes.is_first:
            corpus = prepare(data, folder, progress=progress)
    with processes.together():
        return corpus if processes.is_first else prepare(data, folder, progress=False)


class Replica(nn.Module):
    """The loss of a model as the output of a module, whose backward `DistributedDataParallel` can listen to."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """`batch_loss`."""
        return batch_loss(self.model, inputs_BT, labels_BT)


def replica_of(model: "PreTrainedModel") -> DistributedDataParallel:
    """The loss of a model, once its optimizer is built, with gradients that are the mean over all processes."""
    replica = Replica(model)
    # Running statistics are merged at each step; those of rank 0 must not take the place of the others before that.
    leave_alone_in_ddp(replica, [name for name, _ in replica.named_buffers()])
    keep_out_of_ddp(replica)
    return DistributedDataParallel(
        replica,
        device_ids=[model.device] if model.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
