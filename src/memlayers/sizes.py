"""Bytes: how many tensors take, and how people read them."""

from collections.abc import Iterable

from torch import Tensor


def nominal_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors; those on the meta device count as elsewhere."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def size_text(size: int) -> str:
    """1.25 GB, 31 MB, 4 kB, 12 B; powers of ten."""
    for unit, name, digits in ((10**9, "GB", 2), (10**6, "MB", 0), (10**3, "kB", 0)):
        if size >= unit:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size} B"
