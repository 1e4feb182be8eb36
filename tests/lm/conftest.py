import dataclasses

import pytest

from memlayers.config import MemoryConfig
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig
from memlayers.lm.data import DataConfig, prepare
from memlayers.lm.footprint import Footprint
from memlayers.lm.train import train


@pytest.fixture(autouse=True)
def _not_estimated(request, monkeypatch):
    """An estimate takes longer than these trainings; `test_faults.py` has what a run does with one."""
    if request.path.name != "test_faults.py":
        need = Footprint(parameters=1, gradients=1, optimizer_state=1, activations=1)
        monkeypatch.setattr("memlayers.lm.train.require_memory", lambda *_, **__: need)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory, write_text):
    """A few hundred documents in which a word depends on the one before it."""
    folder = tmp_path_factory.mktemp("text")
    source = write_text(folder / "text.jsonl", documents=300)
    data = DataConfig(sources=(source,), vocab_size=300, holdout_percent=10)
    return prepare(data, folder / "corpus", progress=False)


@pytest.fixture(scope="session")
def tiny_config():
    """Two layers, the second with a memory, six steps of 64 tokens, two evaluations."""
    return RunConfig(
        data=DataConfig(vocab_size=300, holdout_percent=10),
        model=ModelConfig(layers=2, dim=16, heads=2, context=16),
        memory=MemoryConfig(dim=16, heads=2, topk=2, num_subkeys=4, query_dim=8),
        memory_layers=(2,),
        training=TrainingConfig(
            tokens=64 * 6, batch_tokens=64, eval_every_tokens=64 * 4, eval_tokens=300, learning_rate=1e-2
        ),
    )


@pytest.fixture(scope="session")
def tiny_run(tiny_config, tiny_corpus, tmp_path_factory):
    """The folder of a finished run of the tiny model with a memory."""
    folder = tmp_path_factory.mktemp("runs") / "memory"
    config = dataclasses.replace(tiny_config, training=dataclasses.replace(tiny_config.training, tokens=64 * 40))
    train(config, folder, corpus=tiny_corpus, progress=False)
    return folder
