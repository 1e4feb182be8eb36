import dataclasses
import json

import pytest

from memlayers.config import MemoryConfig
from memlayers.lm.config import ModelConfig, RunConfig, TrainingConfig, differences


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (ModelConfig, "family", "bert"),
        (ModelConfig, "layers", 0),
        (ModelConfig, "layers", 2.0),
        (ModelConfig, "layers", True),
        (ModelConfig, "heads", 3),
        (ModelConfig, "context", -1),
        (ModelConfig, "dropout", 1.0),
        (ModelConfig, "dropout", "0.1"),
        (TrainingConfig, "tokens", 0),
        (TrainingConfig, "batch_tokens", 0),
        (TrainingConfig, "learning_rate", 0.0),
        (TrainingConfig, "learning_rate", 10**400),
        (TrainingConfig, "learning_rate", 1e38),
        (ModelConfig, "dim", 10**400),
        (TrainingConfig, "learning_rate", float("nan")),
        (TrainingConfig, "value_learning_rate", float("inf")),
        (TrainingConfig, "value_learning_rate", 1e38),
        (TrainingConfig, "value_schedule", "cosine"),
        (TrainingConfig, "selector_learning_rate", -1e-3),
        (TrainingConfig, "selector_learning_rate", 1e38),
        (TrainingConfig, "schedule", "linear"),
        (TrainingConfig, "warmup", -0.1),
        (TrainingConfig, "warmup", 10.5),
        (TrainingConfig, "weight_decay", -1.0),
        (TrainingConfig, "betas", (0.9,)),
        (TrainingConfig, "betas", (0.9, 1.0)),
        (TrainingConfig, "max_grad_norm", -1.0),
        (TrainingConfig, "precision", "fp8"),
        (TrainingConfig, "eval_every_tokens", 0),
        (TrainingConfig, "eval_tokens", 1),
        (TrainingConfig, "seed", -1),
        (TrainingConfig, "seed", 2**32),
        (TrainingConfig, "gradient_checkpointing", 1),
    ],
)
def test_a_bad_value_is_refused_by_name(section, field, value):
    with pytest.raises(ValueError, match=rf"{field} .*must"):
        section(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_layers": (5,)}, "memory_layers must be an integer from 1 to 4, got 5"),
        ({"memory_layers": (0,)}, "memory_layers must be an integer of at least 1, got 0"),
        ({"memory_layers": (2, 2)}, "memory_layers must name each block once"),
        ({"memory_layers": 2}, "memory_layers must be a list of integers, got 2"),
        ({"memory_kind": "pkm"}, "memory_kind must be one of 'memory', 'memory_plus', 'experts', got 'pkm'"),
        ({"memory_mode": "beside"}, "memory_mode must be one of 'replace', 'parallel', got 'beside'"),
        (
            {"memory_layers": (3,), "memory_share_values": True},
            "memory_share_values must be False with a single one in memory_layers, got True",
        ),
        (
            {"memory_layers": (3,), "memory_kind": "memory_plus", "memory": MemoryConfig(dim=256, keys="flat")},
            "memory.keys must be 'product' with memory_kind 'memory_plus', got 'flat'",
        ),
        ({"model": {"dim": 3}}, "model must be a ModelConfig, got {'dim': 3}"),
        ({"data": None}, "data must be a DataConfig, got None"),
        ({"memory": MemoryConfig(dim=128)}, "memory.dim must be model.dim = 256, got 128"),
        (
            {"training": TrainingConfig(batch_tokens=1000)},
            "training.batch_tokens must be a multiple of model.context = 256, got 1000",
        ),
        (
            {"training": TrainingConfig(precision="fp16"), "memory_layers": (3,)},
            "training.precision must be auto, fp32 or bf16 with a memory, got 'fp16'",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**fields)


@pytest.mark.parametrize("fields", [{"model": 3}, {"memory": 3}, {"training": [1]}])
def test_a_part_that_is_no_mapping_is_named(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must hold fields and their values"):
        RunConfig.from_dict(fields)


def test_a_batch_norm_needs_two_tokens_a_step():
    fields = {
        "model": ModelConfig(dim=8, heads=2, context=1),
        "memory": MemoryConfig(dim=8, topk=1, num_subkeys=2, query_dim=2),
        "training": TrainingConfig(batch_tokens=1),
    }
    RunConfig(**fields)
    with pytest.raises(
        ValueError, match="batch_tokens / training.accumulate must be at least 2 with memory.query_norm 'batch'.* got 1"
    ):
        RunConfig(memory_layers=(1,), **fields)


def test_llama_needs_an_even_width_per_head():
    with pytest.raises(ValueError, match="model.dim / model.heads must be even"):
        ModelConfig(family="llama", dim=12, heads=4)
    ModelConfig(family="gpt2", dim=12, heads=4)


def test_fp16_is_allowed_without_a_memory():
    assert RunConfig(training=TrainingConfig(precision="fp16")).training.precision == "fp16"


def test_json_gives_an_equal_configuration_back(tiny_config):
    config = dataclasses.replace(tiny_config, training=TrainingConfig(batch_tokens=64, betas=(0.8, 0.9)))
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("section", ["data", "model", "memory", "training"])
def test_an_unknown_field_is_refused_by_name(tiny_config, section):
    fields = tiny_config.to_dict()
    fields[section]["nonsense"] = 1
    message = rf"^unknown configuration field '{section}.nonsense'; allowed: {section}\.\w+, [^ ]*{section}\."
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(fields)
    with pytest.raises(ValueError, match="unknown configuration field 'nonsense'"):
        RunConfig.from_dict({"nonsense": 1})


def test_budgets_become_whole_steps():
    training = TrainingConfig(tokens=1001, batch_tokens=100, eval_every_tokens=250, warmup=0.1)
    assert (training.steps, training.warmup_steps, training.eval_every_steps) == (11, 2, 3)
    assert dataclasses.replace(training, warmup=7).warmup_steps == 7
    assert dataclasses.replace(training, warmup=0).warmup_steps == 0


def test_differences_name_the_field_and_both_values(tiny_config):
    other = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, layers=3))
    assert differences(tiny_config, other) == ["model.layers: 2, 3"]
    assert differences(tiny_config, tiny_config) == []


def test_a_memory_that_is_not_there_makes_no_difference(tiny_config):
    other = dataclasses.replace(tiny_config, memory=dataclasses.replace(tiny_config.memory, topk=3))
    assert differences(tiny_config, other) == ["memory.topk: 2, 3"]
    without = [dataclasses.replace(config, memory_layers=()) for config in (tiny_config, other)]
    assert differences(*without) == []


def test_a_configuration_of_before_memories_had_a_kind_is_one_with_the_defaults(tiny_config):
    fields = tiny_config.to_dict()
    for name in ("kind", "mode", "share_values"):
        del fields[f"memory_{name}"]
    del fields["training"]["value_schedule"], fields["training"]["selector_learning_rate"]
    assert RunConfig.from_dict(fields) == tiny_config
    assert (tiny_config.memory_kind, tiny_config.memory_mode, tiny_config.memory_share_values) == (
        "memory", "replace", False,
    )  # fmt: skip
    assert (tiny_config.training.value_schedule, tiny_config.training.selector_learning_rate) == ("constant", None)


def test_how_memories_are_made_and_trained_is_a_difference_where_there_are_memories(tiny_config):
    rates = {"value_schedule": "same", "value_learning_rate": 0.5, "selector_learning_rate": 0.0}
    training = dataclasses.replace(tiny_config.training, **rates)
    other = dataclasses.replace(tiny_config, memory_kind="memory_plus", memory_mode="parallel", training=training)
    assert differences(tiny_config, other) == [
        "memory_kind: 'memory', 'memory_plus'",
        "memory_mode: 'replace', 'parallel'",
        "training.value_learning_rate: 0.03, 0.5",
        "training.value_schedule: 'constant', 'same'",
        "training.selector_learning_rate: None, 0.0",
    ]
    without = [dataclasses.replace(config, memory_layers=()) for config in (tiny_config, other)]
    assert differences(*without) == []


def test_when_checkpoints_are_written_makes_no_difference(tiny_config):
    training = dataclasses.replace(tiny_config.training, save_every_tokens=64, keep_checkpoints=5)
    assert differences(tiny_config, dataclasses.replace(tiny_config, training=training)) == []


@pytest.mark.parametrize("spelled", [{"memory": {"topk_": 3}}, {"memory.topk_": 3}])
def test_a_misspelled_field_is_shown_with_the_right_spelling(spelled):
    with pytest.raises(ValueError, match="^unknown configuration field 'memory.topk_'; did you mean 'memory.topk'\\?$"):
        RunConfig.from_dict(spelled)


def test_fields_may_be_nested_or_dotted_and_are_not_given_twice():
    nested = RunConfig.from_dict({"memory": {"topk": 3}, "model": {"dim": 64}})
    assert RunConfig.from_dict({"memory.topk": 3, "model.dim": 64}) == nested
    assert (nested.memory.topk, nested.model.dim) == (3, 64)
    with pytest.raises(ValueError, match="^configuration field 'memory.topk' is given twice$"):
        RunConfig.from_dict({"memory": {"topk": 3}, "memory.topk": 3})


def test_the_memory_is_as_wide_as_the_model_unless_it_says_otherwise():
    assert RunConfig.from_dict({"model": {"dim": 64}}).memory.dim == 64
    with pytest.raises(ValueError, match="^memory.dim must be model.dim = 64, got 32"):
        RunConfig.from_dict({"model": {"dim": 64}, "memory": {"dim": 32}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topk": 513}, "memory.topk must be at most num_subkeys = 512 for product keys, got 513"),
        ({"query_dim": 7}, "memory.query_dim must be even for product keys .*, got 7"),
        ({"query_norm": "layer"}, "memory.query_norm must be one of 'batch', 'rms', 'none', got 'layer'"),
        ({"topk": "many"}, "memory.topk must be an integer of at least 1, got 'many'"),
    ],
)
def test_a_fault_of_the_memory_carries_its_section(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        RunConfig.from_dict({"memory": fields})
