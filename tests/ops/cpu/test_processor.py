"""What a processor has decides which variant of the kernels runs, or the environment, and each gives the same."""

import os
import subprocess
import sys

import pytest

from memlayers.ops import cpu, registry
from memlayers.ops.cpu import processor

LESSER = processor._variants_here()[:-1]
READ = """
import torch
from memlayers.ops import cpu, read
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    table, slots, weights = torch.randn(50, 69).to(dtype), torch.randint(50, (70, 9)), torch.randn(70, 9)
    expected = read.read_reference(table.double(), slots, weights.double()).float()
    torch.testing.assert_close(cpu.kernels("read").read(table, slots, weights), expected)
print(cpu.variant())
"""
FILES = "cpu/test_read", "cpu/test_select", "cpu/test_search", "cpu/test_infer", "cpu/test_low_bits", "test_row_step"
EVERYTHING = [f"tests/ops/{name}.py" for name in FILES]


def python(*arguments, variant):
    environment = {**os.environ, "MEMLAYERS_CPU": variant}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.skipif(not LESSER, reason="this processor runs one variant")
def test_the_least_variant_reads_as_the_reference_does():
    done = python("-c", READ, variant=LESSER[0])
    assert done.stdout.startswith(f"{LESSER[0]}: "), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("variant", LESSER)
def test_all_kernels_of_every_variant_are_the_references(variant):
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *EVERYTHING, "tests/ops/test_row_step.py", variant=variant
    )
    assert done.returncode == 0, done.stdout[-3000:]


FEATURES = (
    "sse2",
    "avx",
    "avx2",
    "f16c",
    "fma",
    "avxvnni",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "amx-tile",
    "amx-bf16",
)


@pytest.fixture
def machine(monkeypatch):
    """Pretends that the processor has the features given, and compiles for those that it is asked to."""
    monkeypatch.setattr(processor, "_is_x86", lambda: True)
    monkeypatch.setattr(processor, "starts_matrix_units", lambda: True)

    def have(*features, compiled=None):
        monkeypatch.setattr(processor, "_host", lambda: {name: name in features for name in FEATURES})
        monkeypatch.setattr(processor, "_features", lambda: [f"+{name}" for name in compiled or features])

    return have


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (FEATURES, "amx"),
        (FEATURES[:-2], "avx512"),
        (FEATURES[:-3], "avx2"),  # AVX-512 without a part that kernels need
        (FEATURES[:3], "sse2"),
    ],
)
def test_the_greatest_variant_that_the_processor_has_all_of(machine, features, expected):
    machine(*features)
    assert processor.variant() == expected
    assert processor._variants_here() == ["sse2", "avx2", "avx512", "amx"][: len(processor._variants_here())]
    assert processor._variants_here()[-1] == expected


def test_matrix_units_that_the_system_does_not_grant_are_none(machine, monkeypatch):
    machine(*FEATURES)
    monkeypatch.setattr(processor, "starts_matrix_units", lambda: False)
    assert processor.variant() == "avx512"
    assert processor.describe() == "avx512: AVX-512; MEMLAYERS_CPU may be sse2, avx2, avx512"


def test_a_lesser_variant_has_none_of_the_features_of_greater_ones(machine):
    machine(*FEATURES)
    assert processor._without("avx512") == ",".join([*(f"+{name}" for name in FEATURES[:-2]), "-amx-tile", "-amx-bf16"])
    assert processor._without("avx2").split(",")[5:7] == ["+avxvnni", "-avx512f"]
    assert processor._without("sse2").split(",")[:6] == ["+sse2", "-avx", "-avx2", "-f16c", "-fma", "-avxvnni"]


@pytest.mark.parametrize("asked", ["avx512", "AVX2", "neon"])
def test_what_the_processor_does_not_run_is_refused_by_name(machine, monkeypatch, asked):
    real = processor._features.__wrapped__
    machine("sse2", "avx2", "f16c", "fma")
    monkeypatch.setenv("MEMLAYERS_CPU", asked)
    monkeypatch.setattr(processor, "_features", real)
    monkeypatch.setattr(cpu, "why_not", cpu.why_not.__wrapped__)  # which is asked once a process
    with pytest.raises(ValueError, match=f"MEMLAYERS_CPU must be one of sse2, avx2 on this processor, got '{asked}'"):
        cpu.why_not()


def test_other_processors_than_x86_run_one_variant(monkeypatch):
    monkeypatch.setattr(processor, "_is_x86", lambda: False)
    assert processor.describe() == "other: what LLVM finds for it"
    monkeypatch.setenv("MEMLAYERS_CPU", "avx2")
    with pytest.raises(ValueError, match="MEMLAYERS_CPU must be left out on this processor, got 'avx2'"):
        processor._features.__wrapped__()


@pytest.mark.skipif(not LESSER, reason="this processor runs one variant")
def test_a_variant_that_is_asked_for_too_late_is_an_error(monkeypatch):
    """Numba has one target a process, and has it here since `LESSER` at the latest was asked for."""
    processor.variant()
    monkeypatch.setenv("MEMLAYERS_CPU", LESSER[0])
    with pytest.raises(RuntimeError, match=f"MEMLAYERS_CPU={LESSER[0]} comes too late"):
        processor._features.__wrapped__()


def test_memlayers_info_says_which_variant_runs():
    assert registry.describe()["kernels for a CPU"] == processor.describe()
    assert processor.describe().startswith(f"{processor.variant()}: ")
