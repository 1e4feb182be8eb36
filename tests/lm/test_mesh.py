"""What several processes of a run hold and receive, as `memlayers info --mesh` prints it."""

import dataclasses
import math
import re

import pytest
import torch

from memlayers.config import MemoryConfig
from memlayers.lm import mesh as module
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.footprint import Footprint
from memlayers.lm.mesh import mesh_lines

CONFIG = RunConfig(
    model=ModelConfig(layers=2, dim=64, heads=2, context=16),
    memory=MemoryConfig(dim=64, heads=2, topk=4, num_subkeys=100, query_dim=8),
    memory_layers=(2,),
    training=TrainingConfig(batch_tokens=128),
)
HELD = 10_000 * (64 * 12 + 4)  # the table, its moments, and counts


@pytest.fixture
def lines(monkeypatch):
    """The cells of each line by its name, where all but a table takes 1 MB, and `room` is available."""

    def cells(config, mesh, room=10**9):
        def footprint(share, **_):
            assert share.training.batch_tokens == 128 // math.prod(mesh)
            assert share.memory_values == "memory"
            return Footprint(parameters=HELD, gradients=0, optimizer_state=0, activations=10**6)

        monkeypatch.setattr(module, "available_memory", lambda device: room)
        monkeypatch.setattr(module, "footprint", footprint)
        found = mesh_lines(config, mesh, vocab_size=100, precision="fp32", device=torch.device("cpu"))
        return {name: re.split("  +", text) for name, text in found}

    return cells


def test_two_processes_receive_less_as_replicas(lines):
    assert lines(CONFIG, (2,)) == {
        "on 2 processes": ["tables, moments", "received a step", "needed about"],
        # 64 tokens of 8 rows and a gradient of 64 elements, from one other rank.
        "  replicas": ["8 MB", "20 kB", "9 MB"],
        "  columns": ["4 MB", "23 kB", "5 MB"],
        "  dense gradients": ["10 MB", "3 MB"],
        "choose": [
            "replicas: 20 kB received a step for tables, 23 kB with columns; 8 MB of tables and moments held, 4 MB "
            "with columns"
        ],
    }


def test_tables_on_the_host_are_compared_as_if_beside_the_model(lines):
    assert lines(dataclasses.replace(CONFIG, memory_values="host"), (2,)) == lines(CONFIG, (2,))


def test_columns_are_chosen_where_replicas_do_not_fit(lines):
    (said,) = lines(CONFIG, (2,), room=2 * 8 * 10**6)["choose"]
    assert said == (
        "columns: 23 kB received a step for tables, 20 kB with replicas; 4 MB of tables and moments held, 8 MB with "
        "replicas; 8 MB are available for a process here, too little for replicas; columns are for a loop of your own "
        "(memlayers.distributed.shard_tables)"
    )


def test_columns_that_are_too_narrow_are_said_to_be(lines):
    found = lines(CONFIG, (2, 2))
    assert list(found)[1:-2] == ["  replicas", "  2 replicas x 2 columns"]
    assert found["choose"][0].split("; ")[-1] == "fewer than 32 columns for each of 4"


def test_memories_that_share_a_table_send_it_twice_as_much(lines):
    two = dataclasses.replace(CONFIG, memory_layers=(1, 2))
    shared = dataclasses.replace(two, memory_share_values=True)
    assert lines(two, (2,))["  replicas"][:2] == ["15 MB", "41 kB"]
    assert lines(shared, (2,))["  replicas"][:2] == ["8 MB", "41 kB"]


def test_tables_of_experts_stay_whole(lines, monkeypatch):
    found = lines(dataclasses.replace(CONFIG, memory_kind="experts"), (2,))
    assert "  columns" not in found
    assert found["  replicas"][:2] == ["15 MB", "41 kB"]  # two tables
    assert found["choose"][0].endswith("; tables of Experts stay whole")


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of 3 windows of model.context = 16 for as many processes, got 8"):
        mesh_lines(CONFIG, (3,), vocab_size=100, precision="fp32", device=torch.device("cpu"))


def test_a_model_without_memories_is_refused():
    plain = dataclasses.replace(CONFIG, memory_layers=())
    with pytest.raises(ValueError, match="mesh is for a model with memories"):
        mesh_lines(plain, (2,), vocab_size=100, precision="fp32", device=torch.device("cpu"))
