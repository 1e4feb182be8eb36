"""LiveBytes: follows how many bytes of tensors live while fake tensors are computed with, and the most there were."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Within, the storages of all tensors that operations return are counted for as long as they live.

    An operation of this package is one step here, whatever it allocates. `inside` says it, by the operation's name: a
    function that is called with its arguments before it, and that allocates the same.
    """

    def __init__(self, inside: Mapping[str, Callable[..., None]]):
        super().__init__()
        self.now = 0
        self._peak = 0
        self._inside = inside
        self._living: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._living.get(storage._cdata)
            if known is not None and known() is storage:
                continue
            size, address = storage.nbytes(), storage._cdata

            def forget(ended: weakref.ref, size: int = size, address: int = address) -> None:
                self.now -= size
                if self._living.get(address) is ended:
                    del self._living[address]

            self._living[address] = weakref.ref(storage, forget)
            self.now += size
        self._peak = max(self._peak, self.now)

    def take_peak(self) -> int:
        """The most bytes that lived at once since the last call."""
        peak, self._peak = self._peak, self.now
        return peak

    def without_data(self, function: Callable[..., Any], *args: Any) -> None:
        """Count what `function` allocates, run on tensors that do not even claim to have data, and forget its result.

        So whatever asks fake tensors of a CPU for their values does not.
        """
        with torch.utils._python_dispatch._disable_current_modes():
            args = tree_map_only(Tensor, _without_data, args)
        function(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "memlayers" and name in self._inside:
            with self:
                self._inside[name](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
