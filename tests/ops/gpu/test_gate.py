"""The gate of the bench with the GPU's kernels in place."""

import dataclasses

import pytest
import torch

from memlayers.bench import gate
from memlayers.bench.layers import make_table
from memlayers.bench.shapes import shape
from memlayers.bench.training import Moments
from memlayers.ops import gpu
from memlayers.ops.row_sum import Part

SMALL = dataclasses.replace(shape("tiny"), tokens=5, num_subkeys=7, topk=3, dim=24, value_dim=24, query_dim=8)


@pytest.mark.slow  # interpreted
def test_the_gate_opens(device):
    assert gpu.why_not() is None
    gate.check(SMALL, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_step_passes_the_gate(dtype, device):
    table_SV = make_table(SMALL, device).to(dtype)
    moments = Moments.of(make_table(SMALL, device))
    states = moments.exp_avg_SV, moments.exp_avg_sq_SV, torch.zeros(SMALL.slots, dtype=torch.int32, device=device)
    slots_TR = torch.randint(SMALL.slots // 2, (SMALL.tokens, 5), device=device)
    grad_TV = torch.randn(SMALL.tokens, SMALL.value_dim, device=device)
    gate.check_update(SMALL, table_SV, states, Part(slots_TR, torch.rand(slots_TR.shape, device=device), grad_TV))
