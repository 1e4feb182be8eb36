"""The operations of a memory: search, select, read and its gradients, record, row sum and step, infer."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Threads do not survive a fork: how kernels tell a forked process (`memlayers.ops.cpu.launch`).
IMPORTED_IN = os.getpid()


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """In it, products on the tensor's device are computed in the dtypes that they are given."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
