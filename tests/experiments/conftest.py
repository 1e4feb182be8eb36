import dataclasses
import functools
import json
import random

import pytest

from memlayers.config import MemoryConfig
from memlayers.experiments import compare
from memlayers.lm.config import ModelConfig, TrainingConfig
from memlayers.lm.data import DataConfig, prepare
from memlayers.lm.presets import Comparison


@pytest.fixture(scope="module", autouse=True)
def _speed_measured_once():
    """One round after the one that warms up: of speeds only the places are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "measure_speed", functools.partial(compare.measure_speed, repeats=1))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    with open(folder / "text.jsonl", "w") as stream:
        for number in range(200):
            text = " ".join(draw.choice(["tea", "cup", "pot", "milk"]) for _ in range(draw.randint(15, 60)))
            stream.write(json.dumps({"id": number, "text": text}) + "\n")
    data = DataConfig(sources=(str(folder / "text.jsonl"),), vocab_size=270, holdout_percent=10)
    return prepare(data, folder / "corpus", progress=False)


@pytest.fixture(scope="session")
def comparison(corpus):
    return Comparison(
        data=DataConfig(vocab_size=270, holdout_percent=10),
        model=ModelConfig(layers=1, dim=16, heads=2, context=16),
        memory=MemoryConfig(dim=16, heads=2, topk=2, num_subkeys=4, query_dim=8),
        memory_layers=(1,),
        training=TrainingConfig(tokens=64 * 6, batch_tokens=64, eval_every_tokens=64 * 2, eval_tokens=200),
        deep_learning_rate=1e-3,
    )


@pytest.fixture
def changed(comparison):
    """The comparison with other settings of the training."""
    return lambda **fields: dataclasses.replace(comparison, training=dataclasses.replace(comparison.training, **fields))
