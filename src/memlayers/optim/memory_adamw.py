"""MemoryAdamW: one optimizer for a whole model, AdamW for its dense parameters and RowAdam for its value tables."""

from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from torch import nn

from memlayers.checks import plain_number, require_betas, require_choice, require_number
from memlayers.distributed.agreement import Ranks
from memlayers.distributed.wrapping import keep_out_of_ddp
from memlayers.layer import memory_layers
from memlayers.optim.row_adam import Moments, RowAdam
from memlayers.optim.row_optimizer import Rounding, require_row_settings
from memlayers.optim.table_owner import TableOwner
from memlayers.query import HeadRMSNorm, MaskedBatchNorm
from memlayers.values import Companion, ValueTable, value_tables

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Norms whose gains and biases may have more than one dimension; they are not decayed either.
_NORMS = (nn.LayerNorm, nn.RMSNorm, MaskedBatchNorm, HeadRMSNorm)


class MemoryAdamW(TableOwner):
    """AdamW for everything that is not a value table, `RowAdam` for the tables, as one `torch.optim.Optimizer`.

    In a plain loop, or in `transformers.Trainer`: ``Trainer(optimizers=(MemoryAdamW(model, lr=...), scheduler))`` or
    ``Trainer(optimizer_cls_and_kwargs=(MemoryAdamW.for_trainer, {"lr": ...}))``, which builds it on the trainer's own
    model, one of ``model_init`` as well.

    Args:
        model: parameters that need no gradient are left out. Without memories it is trained by AdamW alone.
        lr: of the dense parameters; schedulers move it. A tensor is kept, and may be changed in place.
        betas: decay rates of the moments, of dense parameters and of tables.
        eps: added to the root of the second moment, of both.
        weight_decay: of dense parameters but vectors (biases, gains) and norms; tables are not decayed.
        value_lr: of the tables; it is constant.
        value_max_grad_norm: as ``max_grad_norm`` in `RowOptimizer`.
        value_rounding: as ``rounding`` in `RowOptimizer`.
        value_moments: as ``moments`` in `RowAdam`.
        schedule_values: let schedulers move the rate of the tables, too.
        selector_lr: of the memories' query networks (norms too) and keys, which decide what is read; schedulers move
            it. 0 freezes them, though their gradients still count in a norm that the caller clips. None: `lr`.
        process_group: as in `RowOptimizer`; dense gradients are reduced by `DistributedDataParallel`, or whoever trains
            in several processes. Build the optimizer first, and on the module that DDP then wraps.

    Raises:
        ValueError: as `RowAdam` does; nothing is trainable.
        RuntimeError: as `RowAdam` does, where there are tables; from the second `step`, when no parameter has had a
            gradient before either: another model is being trained.
    """

    rows: type[RowAdam] = RowAdam  # what trains the tables
    _idle_steps: int | None = 0  # those before the first gradient; None after it

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        value_lr: float = 1e-3,
        value_max_grad_norm: float | None = None,
        value_rounding: Rounding = "stochastic",
        value_moments: Moments = "float32",
        schedule_values: bool = False,
        selector_lr: float | None = None,
        process_group: "ProcessGroup | None" = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module (tables are found in it), got {type(model).__name__}")
        require_number("lr", lr, least=0.0)
        if selector_lr is not None:
            require_number("selector_lr", selector_lr, least=0.0)
        require_betas("betas", betas)
        require_number("eps", eps, above=0.0)
        require_number("weight_decay", weight_decay, least=0.0)
        # A rate in a tensor stays one, as in torch: who changes it in place changes the rate.
        lr, selector_lr = (rate if isinstance(rate, torch.Tensor) else plain_number(rate) for rate in (lr, selector_lr))
        beta1, beta2 = map(plain_number, betas)
        betas, eps = (float(beta1), float(beta2)), plain_number(eps)  # torch refuses integers
        self._process_group = process_group
        groups = dense_groups(model, plain_number(weight_decay), selector_lr)
        tables = [table for table in value_tables(model) if table.is_trained]
        require_row_settings(
            lr=value_lr,
            max_grad_norm=value_max_grad_norm,
            rounding=value_rounding,
            schedule_values=schedule_values,
            prefix="value_",
        )
        require_choice("value_moments", value_moments, get_args(Moments))
        if not groups and not tables:
            raise ValueError("model must have at least one parameter that requires a gradient, got none")
        self._dense = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps) if groups else None
        self._rows: RowAdam | None = None
        if tables:
            self._rows = self.rows(
                tables,
                lr=value_lr,
                betas=betas,
                eps=eps,
                max_grad_norm=value_max_grad_norm,
                rounding=value_rounding,
                moments=value_moments,
                schedule_values=schedule_values,
                process_group=process_group,
            )
            try:
                keep_out_of_ddp(model)
            except ValueError:
                self._rows.release()
                raise
        groups = [group for part in self._parts() for group in part.param_groups]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._share()

    @classmethod
    def for_trainer(cls) -> type[Self]:
        """What `transformers.Trainer` calls to be given a class that it then builds on its own model.

        For ``optimizer_cls_and_kwargs=(MemoryAdamW.for_trainer, settings)``, where the settings hold no ``model``.
        """
        return cls

    @property
    def tables(self) -> list[ValueTable]:
        return [] if self._rows is None else self._rows.tables

    def _update(self) -> None:
        self._share()  # somebody may have set other groups, or an empty state, since the last step
        if self._idle_steps is not None:
            self._require_gradients()
        if self._rows is not None and Ranks.of(self._process_group) is None:
            self._rows.before_step()  # a full disk, before dense parameters change
        for part in self._parts():
            part.step()

    def _require_gradients(self) -> None:
        tables = [] if self._rows is None else self._rows.tables
        gradients = [one.grad for group in self.param_groups for one in group["params"]]
        is_used = any(grad is not None for grad in [*gradients, *(table.row_mark.grad for table in tables)])
        if self._rows is not None and (ranks := Ranks.of(self._process_group)) is not None:
            is_used = ranks.any(is_used)
        if is_used:
            self._idle_steps = None
        elif self._idle_steps == 1:  # the first may be made before training begins, for the sake of a scheduler
            raise RuntimeError(
                "no parameter of this optimizer has ever had a gradient: the model that is trained is not the one that "
                "it was built on. With Trainer(model_init=...) pass optimizer_cls_and_kwargs=(MemoryAdamW.for_trainer, "
                '{"lr": ...}) without a model'
            )
        else:
            self._idle_steps = 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, those of rows too."""
        super().zero_grad(set_to_none)
        if self._rows is not None:
            self._rows.zero_grad(set_to_none)

    def release(self) -> None:
        if self._rows is not None:
            self._rows.release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
        if self._rows is not None:
            self._rows.compare_replicas()

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [part for part in (self._dense, self._rows) if part is not None]

    def _share(self) -> None:
        """Both parts step on the groups and the state of the whole, so that schedulers and checkpoints see one."""
        first = 0
        for part in self._parts():
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            if isinstance(part, TableOwner):
                part._chosen = self._chosen
            first = last


def dense_groups(
    model: nn.Module, weight_decay: float, selector_lr: float | torch.Tensor | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters outside of value tables, in a group that is decayed and one that is not.

    With a `selector_lr`, those of the memories' query networks and keys are in two more such groups, at that rate.
    """
    selector = set() if selector_lr is None else selector_parameters(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    # A weight that is tied to that of another module is a table's all the same.
    seen = {parameter for table in value_tables(model) for parameter in table.parameters(recurse=False)}
    for module in model.modules():
        if isinstance(module, ValueTable | Companion):
            continue
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            is_spared = parameter.ndim < 2 or isinstance(module, _NORMS)
            groups.setdefault((parameter in selector, is_spared), []).append(parameter)
    return [
        {
            "params": groups[of_selector, is_spared],
            "weight_decay": 0.0 if is_spared else weight_decay,
            **({"lr": selector_lr} if of_selector else {}),
        }
        for of_selector, is_spared in sorted(groups)
    ]


def selector_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What decides which rows memories read, and with which weights: their query networks, with norms, and keys."""
    parts = (part for layer in memory_layers(model).values() for part in (layer.query, layer.keys))
    return {parameter for part in parts for parameter in part.parameters()}
