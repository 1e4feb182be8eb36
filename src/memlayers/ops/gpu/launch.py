"""How a kernel is started: on the device of its tensors, and not at all for nothing."""

from typing import Any

import torch
import triton.language  # noqa: F401  # here, so that a Triton that does not work is found out when kernels are asked for
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a program for each place of the grid.

    arguments: in the order of the kernel's parameters, at least one of them a tensor. settings: its constants by name,
    and ``num_warps``. Nothing is waited for.
    """
    if 0 in grid:
        return
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(first):  # Triton launches on the current device, whatever its arguments are on
        kernel[grid](*arguments, **settings)
