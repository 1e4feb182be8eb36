"""Experts: a memory whose slots are networks of one neuron.

Letters: T tokens, D model width, H heads, K experts of a head, M = H * K experts of a token, S slots, V value width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memlayers.config import MemoryConfig
from memlayers.layer import MemoryLayer
from memlayers.ops import exported
from memlayers.ops.precision import widened
from memlayers.ops.read import dot, dot_row_mode
from memlayers.values import TablePlace, ValueTable


class Experts(MemoryLayer):
    """The memory m: R^D -> R^D of *Mixture of a Million Experts* (He 2024, arXiv 2407.04153), "PEER".

        m(x) = sum over heads h of sum over i in I_h of g_hi * s(<u_i, x>) * v_i
        I_h = the K slots whose keys k_hi score <q_h(x), k_hi> best, g_h = softmax of these K scores

    Slot i is an expert, a network of one neuron that listens to u_i [D] and says v_i [V]; all heads share them. s is
    the activation, GELU (`activate`). q_h and k_hi are the queries and keys of `MemoryLayer`. The paper has 1,024 ** 2
    experts, H = 8, K = 16, and a BatchNorm of the query.

    Both tables are trained by rows where a row optimizer owns them: no step passes over more than the experts that were
    found. ``values`` is v, ``values.inputs`` is u. Padding has an output of zero.

    The arguments are those of `MemoryLayer`; ``values=first.values`` shares the experts of another layer.

    Raises:
        ValueError: a table of another shape, or one that has no ``inputs``.
    """

    values: "ExpertTable"

    def __init__(
        self,
        config: MemoryConfig,
        *,
        values: ValueTable | TablePlace | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        inputs = getattr(values, "inputs", None)
        if isinstance(values, ValueTable) and (inputs is None or inputs.shape != (config.slots, config.dim)):
            what = "none" if inputs is None else f"{inputs.shape[0]} x {inputs.shape[1]}"
            raise ValueError(
                f"values must be the table of Experts, whose inputs are {config.slots} x {config.dim}, got {what}"
            )
        super().__init__(config, values=values, device=device, dtype=dtype)

    def make_values(self, **where: Any) -> "ExpertTable":
        config = self.config
        return ExpertTable(config.slots, config.width, config.dim, std=config.value_std, **where)

    def activate(self, products_TM: Tensor) -> Tensor:
        """What neurons make of their products <u, x>; a subclass may override it."""
        return F.gelu(products_TM)

    def read(self, x_TD: Tensor, slots_THK: Tensor, weights_THK: Tensor) -> Tensor:
        slots_TM, weights_TM = slots_THK.flatten(1), weights_THK.flatten(1)
        # An adapter of PEFT on the table stands around it, and has no other attribute of it.
        table: ExpertTable = getattr(self.values, "base_layer", self.values)
        neurons_TM = self.activate(table.inputs(slots_TM, x_TD))
        return self.values(slots_TM, weights_TM * neurons_TM)


class ExpertTable(ValueTable):
    """S experts: what each says, a table of width V as any other, and what it listens to, the table ``inputs``.

    Args:
        slots: S, the number of experts.
        dim: V, the width of what an expert says.
        input_dim: D, the width of what it listens to.
        device: of the rows.
        dtype: of the rows.
        std: as in `ValueTable`, of what experts say.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        input_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        std: float | None = None,
    ):
        super().__init__(slots, dim, device=device, dtype=dtype, std=std)
        self.inputs = InputTable(slots, input_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Each normal: what experts listen to with a standard deviation of one over the root of its width."""
        super().reset_parameters()
        if "inputs" in self._modules:  # not yet, when the constructor of ValueTable calls
            self.inputs.reset_parameters()


class InputTable(ValueTable):
    """A table whose rows are multiplied with an input; all else is as of a `ValueTable`.

    It is called with slots [..., M] and inputs [..., D], and returns the products <row, input> [..., M] in at least
    float32. In row mode backward records as weights the gradients of the products, and as gradient of the output the
    input.
    """

    _operations = (exported.dot, dot, dot_row_mode)

    def forward(self, slots: Tensor, inputs: Tensor) -> Tensor:
        if slots.shape[:-1] != inputs.shape[:-1]:
            raise ValueError(
                f"slots and inputs must have one leading shape, got {[*slots.shape[:-1]]} and {[*inputs.shape[:-1]]}"
            )
        if slots.ndim == 1:  # of one token
            return self.forward(slots[None], inputs[None]).squeeze(0)
        products_TM = self._compute(slots.flatten(0, -2), widened(inputs.flatten(0, -2)))
        return products_TM.unflatten(0, slots.shape[:-1])
