import pytest
import torch

from memlayers.sizes import nominal_bytes, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1 kB"),
        (9_999, "10 kB"),
        (31_400_000, "31 MB"),
        (1_250_000_000, "1.25 GB"),
        (1_234_560_000_000, "1,234.56 GB"),
    ],
)
def test_sizes_have_units_in_powers_of_ten(size, text):
    assert size_text(size) == text


def test_tensors_without_memory_count_as_elsewhere():
    assert nominal_bytes([torch.empty(3, 2), torch.empty(5, dtype=torch.bfloat16, device="meta")]) == 34
