from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from memlayers import MemoryConfig
from memlayers.models import add_memory, causal_lm, memory_layers


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def memory_config() -> MemoryConfig:
    return MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)


@pytest.fixture
def plain(family: str) -> PreTrainedModel:
    """Four blocks of width 16."""
    return causal_lm(family, vocab_size=40, layers=4, dim=16, heads=2, context=32).eval()


@pytest.fixture
def with_memory(plain: PreTrainedModel, memory_config: MemoryConfig) -> PreTrainedModel:
    """The same with memories in blocks 2 and 3 that share a table, and statistics that are not the initial ones."""
    model = add_memory(plain, memory_config, [2, 3], share_values=True)
    for memory in memory_layers(model).values():
        memory.query.norm.running_mean.normal_()
        memory.query.norm.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def enable_checkpointing() -> Callable[[PreTrainedModel, bool], None]:
    def enable(model: PreTrainedModel, use_reentrant: bool) -> None:
        # Renamed in transformers 5; the old name warns.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": use_reentrant})

    return enable
