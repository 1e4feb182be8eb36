"""What others train tables of values by: PyTorch's Adam with a dense gradient, and its SparseAdam.

Only the rule differs from `RowAdam`: tables are owned, read and recorded in the same way, and the gradient is then put
into the form that the rule takes. Here for the experiment `updates`; nobody needs them for a model.

Letters: S slots, V value width, M entries (slot, weight, token).
"""

from typing import Any

import torch
from torch import Tensor

from memlayers.ops.row_sum import dense_sum, parts_of
from memlayers.optim import MemoryAdamW, RowAdam


class DenseRule(RowAdam):
    """Adam on all rows, read or not."""

    def new_state(self, weight_SV, group):
        return {"exp_avg": torch.zeros_like(weight_SV), "exp_avg_sq": torch.zeros_like(weight_SV)}

    def update(self, weight_SV, state, factors, group, *, lr, **how):
        parts = parts_of(*factors)
        weight_SV.grad = self.gradient(weight_SV, parts)
        rule = self.rule(weight_SV, lr=lr, betas=group["betas"], eps=group["eps"])
        rule.state[weight_SV] = {"step": self.steps(group), **state}
        rule.step()
        weight_SV.grad = None

    def gradient(self, weight_SV: Tensor, parts: list) -> Tensor:
        """The gradient in the form that the rule takes."""
        return dense_sum(parts, len(weight_SV)).grad_PV

    def rule(self, weight_SV: Tensor, **settings: Any) -> torch.optim.Optimizer:
        """PyTorch's optimizer, for one step."""
        return torch.optim.Adam([weight_SV], **settings)

    def steps(self, group: dict[str, Any]) -> Any:
        """How many steps were made before, as the rule counts them."""
        return torch.tensor(float(group["updates"]))


class SparseRule(DenseRule):
    """Adam on the rows that were read, with the bias correction of the step rather than of the row."""

    def gradient(self, weight_SV, parts):
        slots_M = torch.cat([part.slots_TK.flatten() for part in parts])
        rows_MV = torch.cat([(part.weights_TK[..., None] * part.grad_TV[:, None]).flatten(0, 1) for part in parts])
        return torch.sparse_coo_tensor(
            slots_M[None], rows_MV.to(weight_SV.dtype), weight_SV.shape, check_invariants=False
        )

    def rule(self, weight_SV, **settings):
        lr = settings.pop("lr")
        rule = torch.optim.SparseAdam([weight_SV], **settings)
        rule.param_groups[0]["lr"] = lr  # a warm-up begins at zero, which only the constructor refuses
        return rule

    def steps(self, group):
        return group["updates"]


class DenseValues(MemoryAdamW):
    """`MemoryAdamW` whose tables follow `DenseRule`."""

    rows = DenseRule


class SparseValues(MemoryAdamW):
    """`MemoryAdamW` whose tables follow `SparseRule`."""

    rows = SparseRule
