"""A second device for `test_host.py`, which runs this file by itself: a process has one such device for good.

Its tensors are wrappers around those of the CPU, and an operation on tensors of both devices is an error, as it is
between a GPU and its host. So what works here has moved each tensor to where it is used.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from memlayers import HostMemory, MemoryConfig, MemoryLayer, UsageMeter, doctor, select_slots
from memlayers.optim import MemoryAdamW

AWAY = torch.device("privateuseone", 0)  # "away" from `main` on
CONFIG = MemoryConfig(dim=32, heads=2, topk=4, num_subkeys=16, query_dim=8)


class Away(Tensor):
    """A tensor on the second device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Away":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=AWAY,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Also of what is made from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation where its tensors are."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    is_away = [isinstance(one, Away) for one in tensors]
    name, device = func.overloadpacket.__name__, kwargs.get("device")
    if device is not None:
        away, kwargs = torch.device(device).type == AWAY.type, {**kwargs, "device": "cpu"}
    else:
        away = any(is_away)
    mixed = [one for one, its in zip(tensors, is_away, strict=True) if one.ndim and its is not away]
    if mixed and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{func} was given tensors of two devices: {[(one.shape, one.device) for one in tensors]}")
    wrappers = {id(one.inner): one for one in tensors if isinstance(one, Away)}
    args, kwargs = tree_map_only(Away, lambda one: one.inner, (args, kwargs))
    result = func(*args, **kwargs)
    if name == "copy_":
        return tensors[0]
    return (
        tree_map_only(Tensor, lambda one: wrappers[id(one)] if id(one) in wrappers else Away(one), result)
        if away
        else result
    )


def empty(size: Any, stride: Any, *, dtype: torch.dtype | None = None, **where: Any) -> Tensor:
    """What indexing by a list is made with, where no mode sees it."""
    return Away(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Tensor, target: Any, non_blocking: bool = False) -> Tensor:
    """The same of its contents."""
    target.inner.copy_(source)
    return target


def layer_of(values: HostMemory | None, device: torch.device | str) -> MemoryLayer:
    torch.manual_seed(0)
    return MemoryLayer(CONFIG, values=values).to(device)


def train(layer: MemoryLayer, device: torch.device | str, optimizer: MemoryAdamW | None = None) -> list[float]:
    """The losses of some steps, of which the last ones are of some rows alone."""
    optimizer = optimizer or MemoryAdamW(layer, value_max_grad_norm=0.1)
    draw, losses = torch.Generator().manual_seed(1), []
    for number in range(4):
        x = torch.randn(6, CONFIG.dim, generator=draw).to(device)
        if number == 2:
            optimizer.choose_rows(select_slots(layer, None, x, method="all"))
        optimizer.zero_grad()
        with UsageMeter(layer):
            loss = (layer(x) - 1).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_dense(layer: MemoryLayer, device: torch.device | str) -> list[float]:
    """The losses of some steps without a row optimizer."""
    optimizer, losses = torch.optim.AdamW(layer.parameters()), []
    x = torch.randn(6, CONFIG.dim, generator=torch.Generator().manual_seed(2)).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (layer(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(rename="away")
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    expected = layer_of(None, "cpu")
    losses, dense_losses = train(expected, "cpu"), train_dense(layer_of(None, "cpu"), "cpu")
    run = layer_of(None, "cpu")
    of_run = MemoryAdamW(run, value_max_grad_norm=0.1)
    train(run, "cpu", of_run)
    saved = copy.deepcopy([run.state_dict(), of_run.state_dict()])
    later_losses = train(run, "cpu", of_run)
    with SecondDevice():
        layer = layer_of(HostMemory(), AWAY)
        places = {name: parameter.device.type for name, parameter in layer.named_parameters()}
        assert {name for name, place in places.items() if place == "cpu"} == {
            "values.weight",
            "values.companion.row_mark",
        }, places
        assert train(layer, AWAY) == losses
        assert train_dense(layer_of(HostMemory(), AWAY), AWAY) == dense_losses
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor.cpu(), expected.state_dict()[name]), name
        # What was saved by a model all of which was there.
        layer = layer_of(HostMemory(), AWAY)
        layer.load_state_dict(tree_map_only(Tensor, lambda one: one.to(AWAY), saved[0]))
        optimizer = MemoryAdamW(layer, value_max_grad_norm=0.1)
        optimizer.load_state_dict(tree_map_only(Tensor, lambda one: one.to(AWAY), saved[1]))
        assert train(layer, AWAY, optimizer) == later_losses
        report = doctor(layer, torch.randn(64, CONFIG.dim).to(AWAY), optimizer=optimizer)
        assert report.ok, str(report)
    print("all as on one device")


if __name__ == "__main__":
    main()
