"""In which dtype an operation computes: at least in float32, whatever it is given; in float64 where that is given."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from memlayers.torch_private import is_exporting


def wide_dtype(*given: torch.dtype) -> torch.dtype:
    """float64 where one of them is, float32 for everything narrower."""
    return torch.float64 if torch.float64 in given else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that is computed in; itself where that is its own."""
    return tensor.to(wide_dtype(tensor.dtype))


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Inside, products on the tensor's device are computed in the dtypes that they are given."""
    if tensor.is_meta or is_exporting():  # an exported program has no such contexts
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
