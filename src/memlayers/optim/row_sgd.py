"""RowSGD: stochastic gradient descent for value tables, without any state, fed by their row gradients."""

from memlayers.ops.row_step import row_sgd_
from memlayers.optim.row_optimizer import RowOptimizer


class RowSGD(RowOptimizer):
    """row -= lr * gradient for the rows that were read; arguments and errors are those of `RowOptimizer`."""

    _takes_rates = True

    def new_state(self, weight_SV, group):
        """None."""
        return {}

    def update(self, weight_SV, state, factors, group, *, lr, **how):
        row_sgd_(weight_SV, *factors, lr=lr, **how)
