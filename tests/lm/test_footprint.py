import dataclasses
import json
import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from memlayers.available import available_memory, left_in_groups
from memlayers.config import MemoryConfig
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.footprint import _ENTRY, Footprint, explain_out_of_memory, footprint, require_memory
from memlayers.ops import cpu, gpu
from memlayers.sizes import size_text
from memlayers.values import value_tables

# In a process of its own: the same plain loop that `footprint` counts, three steps of it. What libraries take for
# themselves at first use, some 25 MB, is taken before by a step of a model without a size to speak of.
MEASURE = """
import gc, json, re, sys
import torch
from memlayers.lm.build import batch_loss, build_model, build_optimizer
from memlayers.lm.config import RunConfig
from memlayers.lm.evaluate import autocast
from memlayers.ops import cpu

def held(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)[1]) * 1024

def train(config, vocab_size, dense, precision, steps):
    model = build_model(config, vocab_size=vocab_size, eot_id=0).train()
    if config.training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters()) if dense else build_optimizer(config, model)
    parts = config.training.accumulate
    for _ in range(steps):
        for _ in range(parts):
            tokens_BT = torch.randint(vocab_size, (config.batch_windows // parts, config.model.context))
            with autocast(torch.device("cpu"), precision):
                loss = batch_loss(model, tokens_BT, tokens_BT) / parts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

order = json.loads(sys.argv[1])
config, small = RunConfig.from_dict(order["config"]), RunConfig.from_dict(order["small"])
torch.set_num_threads(1)
cpu.compile_all()
train(small, 100, order["dense"], order["precision"], 1)
gc.collect()
before = held("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
train(config, order["vocab_size"], order["dense"], order["precision"], 3)
print(held("VmHWM") - before)
"""


def run_config(
    family="gpt2",
    *,
    layers=2,
    dim=128,
    batch=1024,
    context=128,
    accumulate=1,
    memory=(),
    subkeys=32,
    checkpointing=False,
):
    return RunConfig(
        model=ModelConfig(family=family, layers=layers, dim=dim, heads=2, context=context),
        memory=MemoryConfig(dim=dim, num_subkeys=subkeys, query_dim=64),
        memory_layers=memory,
        training=TrainingConfig(batch_tokens=batch, accumulate=accumulate, gradient_checkpointing=checkpointing),
    )


def measured(config, vocab_size, *, dense=False, precision="fp32"):
    small = run_config(config.model.family, layers=1, dim=16, batch=128, memory=(1,), subkeys=32)
    order = {"config": config.to_dict(), "small": small.to_dict(), "vocab_size": vocab_size, "dense": dense}
    order["precision"] = precision
    # Blocks below 32 MB are otherwise cut from a heap that glibc does not give back, and how well they fit into what
    # was freed is no property of the training step.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(order)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
slow = pytest.mark.slow

CASES = {
    "table": (run_config(memory=(2,), subkeys=320, dim=256, batch=512), 1000, {}),
    "logits": (run_config(batch=1024), 20_000, {}),
    "table, dense": (run_config(memory=(2,), subkeys=256, dim=192, batch=512), 1000, {"dense": True}),
    "logits, llama": (run_config("llama", batch=1024), 30_000, {}),
    "accumulate": (run_config(memory=(2,), subkeys=128, dim=256, batch=4096, accumulate=4), 15_000, {}),
    "merged rows": (run_config(memory=(2,), subkeys=64, dim=256, batch=16_384, accumulate=8), 5000, {}),
    "blocks": (run_config(layers=6, dim=256, batch=2048), 1000, {}),
    "blocks, llama": (run_config("llama", layers=6, dim=256, batch=2048), 1000, {}),
    "checkpointing": (run_config(layers=8, dim=384, batch=4096, memory=(3,), checkpointing=True), 1000, {}),
    "checkpointing, llama": (run_config("llama", layers=8, dim=384, batch=4096, checkpointing=True), 1000, {}),
    "bf16": (run_config(layers=4, dim=256, batch=2048, memory=(3,)), 8000, {"precision": "bf16"}),
    "bf16, checkpointing": (
        run_config(layers=8, dim=384, batch=4096, memory=(3,), checkpointing=True),
        1000,
        {"precision": "bf16"},
    ),
    "context": (run_config(layers=4, batch=4096, context=1024), 2000, {}),
    "vocabulary": (run_config(batch=512, accumulate=4), 60_000, {}),
}


@slow
@on_linux
@pytest.mark.parametrize("case", CASES)
def test_the_footprint_is_within_10_percent_of_the_measured_peak(case):
    config, vocab_size, options = CASES[case]
    estimated = footprint(config, vocab_size=vocab_size, **options).total
    assert estimated == pytest.approx(measured(config, vocab_size, **options), rel=0.10)


STEP = """
import re, sys
import torch
from memlayers.ops import cpu
from memlayers.optim import RowAdam
from memlayers.values import ValueTable

def held(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)[1]) * 1024

torch.set_num_threads(1)
cpu.compile_all()
table = ValueTable(2**16, 128)
optimizer = RowAdam(table)
for tokens in (4, 2**13):  # the first step makes the state
    table(torch.randint(64, (tokens, 256)), torch.ones(tokens, 256)).sum().backward()
    before = held("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    optimizer.step()
print(held("VmHWM") - before)
"""


@on_linux
def test_the_entries_of_a_row_step_take_what_is_counted_for_them():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, text=True, env=environment, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == pytest.approx(2**13 * 256 * _ENTRY, rel=0.05)


@pytest.mark.parametrize("kind", ["memory", "experts"])
def test_parameters_gradients_and_state_are_exact(kind):
    config = dataclasses.replace(run_config(memory=(2,), subkeys=64, batch=256), memory_kind=kind)
    found = footprint(config, vocab_size=500)
    torch.manual_seed(0)
    from memlayers.lm.build import batch_loss, build_model, build_optimizer
    from memlayers.models import memory_layers

    model = build_model(config, vocab_size=500, eot_id=0)
    optimizer = build_optimizer(config, model)
    tokens_BT = torch.randint(500, (2, 128))
    batch_loss(model, tokens_BT, tokens_BT).backward()
    (memory,) = memory_layers(model).values()
    tables = value_tables(memory)
    assert len(tables) == (2 if kind == "experts" else 1)
    rows = sum(factor.nbytes for table in tables for part in table.row_gradient._parts for factor in part)
    tensors = [*model.parameters(), *model.buffers()]
    assert found.parameters == sum(tensor.nbytes for tensor in tensors)
    assert found.gradients == rows + sum(weight.grad.nbytes for weight in model.parameters() if weight.grad is not None)
    optimizer.step()
    assert found.optimizer_state == sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def test_a_shared_table_is_counted_once_and_both_record():
    config = dataclasses.replace(run_config(layers=2, memory=(1, 2), subkeys=128, batch=256), memory_kind="memory_plus")
    apart, shared = (
        footprint(dataclasses.replace(config, memory_share_values=value), vocab_size=300) for value in (False, True)
    )
    table = 128**2 * 128 * 4
    assert apart.parameters - shared.parameters == pytest.approx(table, abs=64)
    assert apart.optimizer_state - shared.optimizer_state == pytest.approx(2 * table + 128**2 * 4, abs=64)
    assert apart.gradients - shared.gradients == pytest.approx(0, abs=64)


def test_recorded_rows_grow_with_the_parts_of_a_step_until_they_are_merged():
    def rows(accumulate, subkeys):
        config = run_config(memory=(2,), subkeys=subkeys, batch=128 * accumulate, accumulate=accumulate)
        return footprint(config, vocab_size=300).gradients

    one, four = rows(1, 256), rows(4, 256)
    part = 128 * (4 * 32 * (8 + 4) + 128 * 4)  # slots and weights of 4 heads x 32 rows, and the output's gradient
    assert four - one == 3 * part
    # Three parts are larger than a dense gradient; twelve are merged into one, with a slot and a weight a row.
    assert rows(12, 32) - (rows(1, 32) - part) == 32**2 * (128 * 4 + 8 + 4)


def test_a_dense_optimizer_needs_a_gradient_of_the_whole_table():
    config = run_config(memory=(2,), subkeys=128, batch=256)
    rows, dense = (footprint(config, vocab_size=300, dense=dense) for dense in (False, True))
    table = 128**2 * 128 * 4
    assert dense.parameters == pytest.approx(rows.parameters, abs=64)
    assert dense.gradients > table > rows.gradients - (dense.gradients - table)
    assert dense.total > rows.total + table


def test_a_table_smaller_than_what_a_token_reads_can_be_asked_about():
    config = run_config(memory=(2,), subkeys=32, dim=16, batch=128)
    config = dataclasses.replace(config, memory=MemoryConfig(dim=16, num_subkeys=4, topk=4, heads=64, query_dim=16))
    assert footprint(config, vocab_size=300).optimizer_state > 2 * 16 * 16 * 4


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=slow), "llama"])
def test_gradient_checkpointing_lowers_the_activations(family):
    kept, recomputed = (
        footprint(run_config(family, layers=8, batch=1024, checkpointing=on), vocab_size=300) for on in (False, True)
    )
    assert recomputed.activations < kept.activations / 2
    assert recomputed.parameters == kept.parameters


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_device_and_precision_can_be_asked_for_without_a_gpu(device, precision):
    config = run_config(memory=(2,), subkeys=64, batch=512, accumulate=4)
    found = footprint(config, vocab_size=300, device=device, precision=precision)
    assert min(found.to_dict().values()) > 0


def test_the_kernels_of_a_gpu_need_less_than_the_references(monkeypatch):
    config = run_config(memory=(2,), subkeys=64, batch=2048)
    found = []
    for reason in (None, "switched off"):
        monkeypatch.setattr(gpu, "why_not", lambda reason=reason: reason)
        footprint.cache_clear()
        found.append(footprint(config, vocab_size=300, device="cuda").activations)
    footprint.cache_clear()
    assert found[0] < found[1]


@pytest.mark.parametrize("dense", [False, True])
def test_it_is_counted_where_there_are_no_kernels(monkeypatch, dense):
    config = run_config(memory=(2,), subkeys=64, batch=512)
    with_kernels = footprint(config, vocab_size=300, dense=dense)
    monkeypatch.setattr(cpu, "why_not", lambda: "switched off")
    footprint.cache_clear()
    without = footprint(config, vocab_size=300, dense=dense)
    footprint.cache_clear()
    assert without.parameters == with_kernels.parameters
    assert without.optimizer_state == with_kernels.optimizer_state
    assert without.activations > 0


def test_half_precision_lowers_the_activations_of_blocks():
    config = run_config(layers=6, batch=1024)
    fp32, bf16 = (footprint(config, vocab_size=300, precision=precision) for precision in ("fp32", "bf16"))
    assert bf16.activations < 0.9 * fp32.activations


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match='device must be "cpu" or "cuda", got \'tpu\''):
        footprint(run_config(), vocab_size=300, device="tpu")


def test_a_large_run_is_asked_about_without_memory_and_random_numbers():
    config = RunConfig(
        model=ModelConfig(layers=12, dim=1024, heads=16, context=512),
        memory=MemoryConfig(dim=1024, num_subkeys=512),
        memory_layers=(9,),
        training=TrainingConfig(batch_tokens=16_384),
    )
    state, peak = torch.get_rng_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = footprint(config, vocab_size=60_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # kB
    assert torch.equal(torch.get_rng_state(), state)
    assert found.total > 15 * 10**9


def test_sizes_are_written_for_people():
    assert [size_text(size) for size in (12, 4_400, 31_000_000, 1_254_000_000)] == ["12 B", "4 kB", "31 MB", "1.25 GB"]
    found = Footprint(parameters=10**9, gradients=10**6, optimizer_state=10**3, activations=1)
    assert found.total == 1_001_001_001
    assert found.lines()[0] == ("parameters", "1.00 GB")
    assert found.lines()[-1] == ("total", "1.00 GB")
    assert "optimizer state" in found.table()


def test_a_step_that_does_not_fit_is_refused_with_what_helps(monkeypatch):
    monkeypatch.setattr("memlayers.lm.footprint.available_memory", lambda device: 50 * 10**6)
    config = run_config(memory=(2,), subkeys=256, batch=512)
    with pytest.raises(ValueError, match="lower memory.num_subkeys .now 256.*raise training.accumulate") as refusal:
        require_memory(config, vocab_size=1000)
    assert "optimizer state" in str(refusal.value)
    assert "50 MB are available on cpu" in str(refusal.value)


def test_a_step_that_fits_is_not_refused():
    assert require_memory(run_config(batch=256), vocab_size=300) == footprint(run_config(batch=256), vocab_size=300)


def test_available_memory_is_below_the_memory_of_the_machine():
    assert 0 < available_memory("cpu") <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


def test_the_tightest_limit_of_a_control_group_and_of_those_above_it_counts(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    write(root / "outer", memory__max=1000, memory__current=400, memory__stat="anon 5\ninactive_file 150\n")
    write(root / "outer" / "inner", memory__max="max", memory__current=100, memory__stat="inactive_file 0\n")
    assert left_in_groups(membership, root) == 1000 - 400 + 150
    write(root / "outer" / "inner", memory__max=300)
    assert left_in_groups(membership, root) == 200


def test_limits_of_control_groups_of_version_1_count(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("5:cpu:/other\n4:memory:/docker/abc\n")
    write(  # the container's own group, mounted as the root
        root / "memory", memory__limit_in_bytes=900, memory__usage_in_bytes=500, memory__stat="total_inactive_file 20\n"
    )
    assert left_in_groups(membership, root) == 420
    write(root / "memory", memory__limit_in_bytes=9223372036854771712)
    assert left_in_groups(membership, root) > 2**60


def test_no_control_group_is_no_limit(tmp_path):
    assert left_in_groups(tmp_path / "missing", tmp_path) > 2**60


NEED = Footprint(parameters=10**9, gradients=10**9, optimizer_state=2 * 10**9, activations=10**9)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_errors_for_lack_of_memory_are_explained(error):
    text = explain_out_of_memory(error, NEED)
    assert "about 5.00 GB" in text
    assert "training.accumulate" in text


def test_other_errors_are_not_explained():
    assert explain_out_of_memory(RuntimeError("shapes do not fit"), NEED) is None
    assert explain_out_of_memory(ValueError("no"), NEED) is None


@slow
@on_linux
def test_a_real_failure_of_the_cpus_allocator_is_explained():
    script = textwrap.dedent(
        """
        import resource, torch
        from memlayers.lm.footprint import Footprint, explain_out_of_memory
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        try:
            torch.empty(2**30)
        except BaseException as error:
            need = Footprint(parameters=2**32, gradients=0, optimizer_state=0, activations=0)
            print(explain_out_of_memory(error, need))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("out of memory: a training step needs about 4.29 GB"), done.stderr
