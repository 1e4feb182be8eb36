import copy
import pickle

import pytest
import torch
from torch import nn

from memlayers.models import (
    add_memory,
    causal_lm,
    freeze_base,
    load_memory,
    memory_layers,
    remove_memory,
    save_memory,
)
from memlayers.models.identity import BaseIdentity, identity_of, recorded_base
from memlayers.models.wrappers import find_wrappers

# peft asks models for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def small(family="gpt2", seed=0):
    torch.manual_seed(seed)
    return causal_lm(family, vocab_size=40, layers=4, dim=16, heads=2, context=32)


def base_of(model):
    """The base that the model says that its memories were added to."""
    return recorded_base(wrapper for _, wrapper in find_wrappers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16])
def test_one_base_in_two_precisions_is_one(dtype, other):
    first, second = (identity_of(small().to(kind)) for kind in (dtype, other))
    assert first.differing(second) == []
    assert second.differing(first) == []
    if torch.float16 not in (dtype, other):  # exactly, not within a tolerance
        assert [known.values for known in first.tensors.values()] == [known.values for known in second.tensors.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_base_differs(dtype, family):
    first, second = (identity_of(small(family, seed).to(dtype)) for seed in (0, 1))
    drawn = {name for name, parameter in small(family).named_parameters() if parameter.std() > 0}
    assert set(first.differing(second)) >= drawn


def test_slight_training_is_seen():
    model = small()
    before = identity_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-4 * torch.randn_like(parameter)
    assert len(before.differing(identity_of(model))) > len(before.tensors) / 2


def test_float16_may_be_off_by_a_neighbour_and_no_more():
    one_step = 2.0**-7  # of bfloat16, from 1 on
    linear = nn.Linear(4, 4, bias=False).half()
    identities = []
    for value in (1.0, 1.0 + one_step, 1.0 + 2 * one_step):
        nn.init.constant_(linear.weight, value)
        identities.append(identity_of(linear))
    assert identities[0].differing(identities[1]) == []
    assert identities[0].differing(identities[2]) == ["weight"]
    nn.init.constant_(linear.weight, -1.0)
    assert identity_of(linear).differing(identities[0]) == ["weight"]
    linear.float()
    nn.init.constant_(linear.weight, 1.0)
    exact = identity_of(linear)
    nn.init.constant_(linear.weight, 1.0 + one_step)
    assert exact.differing(identity_of(linear)) == ["weight"]


def test_what_float16_cannot_hold_does_not_count():
    linear = nn.Linear(4, 4, bias=False)
    nn.init.constant_(linear.weight, 1e-8)
    before = identity_of(linear)
    assert before.differing(identity_of(linear.half())) == []
    assert before.differing(identity_of(linear.float())) == ["weight"]


def test_values_are_the_same_whatever_the_strides():
    weight = torch.randn(6, 10)
    linear = nn.Linear(10, 6, bias=False)
    linear.weight = nn.Parameter(weight)
    plain = identity_of(linear)
    linear.weight = nn.Parameter(weight.t().contiguous().t())
    assert not linear.weight.is_contiguous()
    assert identity_of(linear) == plain


def test_sixteen_values_of_a_tensor_are_kept_from_all_over_it():
    linear = nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(256.0).view(16, 16))
        linear.bias.copy_(torch.arange(16.0))
    kept = identity_of(linear).tensors
    bits = [format(torch.tensor(float(place)).view(torch.int32).item() >> 16, "04x") for place in range(256)]
    assert kept["weight"].values == "".join(bits[8::16])
    assert kept["bias"].values == "".join(bits[:16])
    assert identity_of(nn.Linear(1, 3)).tensors["weight"].shape == (3, 1)
    assert len(identity_of(nn.Linear(1, 3)).tensors["weight"].values) == 3 * 4


def test_a_change_of_one_sixteenth_of_a_tensor_is_seen():
    linear = nn.Linear(16, 16, bias=False)
    before = identity_of(linear)
    for part in linear.weight.detach().view(16, 16):
        part += 1.0
        assert before.differing(identity_of(linear)) == ["weight"]
        part -= 1.0


def test_shapes_missing_tensors_and_buffers_count():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[0].register_buffer("passing", torch.ones(3), persistent=False)
    before = identity_of(module)
    assert set(before.tensors) == set(module.state_dict())
    assert before.differing(identity_of(module[:1])) == [name for name in before.tensors if name.startswith("1.")]
    module[1].running_mean += 1.0
    assert before.differing(identity_of(module)) == ["1.running_mean"]
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert "0.weight" in before.differing(identity_of(other))


def test_weights_that_are_not_there_are_compared_by_shape():
    here = identity_of(nn.Linear(3, 4))
    with torch.device("meta"):
        assert here.differing(identity_of(nn.Linear(3, 4))) == []
        assert here.differing(identity_of(nn.Linear(4, 4))) == ["weight"]


def test_json_and_back(family):
    identity = identity_of(small(family))
    assert BaseIdentity.from_dict(identity.to_dict()) == identity
    assert identity.class_name == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family]
    assert (identity.model_type, identity.dtype, identity.name_or_path) == (family, "float32", "")


@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_memories_leave_the_base_as_it_was(family, memory_config, mode):
    model = small(family)
    before = identity_of(model)
    add_memory(model, memory_config, [2, 3], mode=mode)
    now = identity_of(model)
    assert base_of(model) == now
    gone = set(before.tensors) - set(now.tensors)
    assert bool(gone) is (mode == "replace")
    assert all(".1.mlp." in name or ".2.mlp." in name for name in gone)
    assert before == BaseIdentity(**{**vars(now), "tensors": before.tensors})
    assert now.tensors == {name: known for name, known in before.tensors.items() if name not in gone}


def test_copies_keep_what_was_recorded(with_memory):
    recorded = base_of(with_memory)
    assert recorded is not None
    assert base_of(copy.deepcopy(with_memory)) == recorded
    assert base_of(pickle.loads(pickle.dumps(with_memory))) == recorded
    assert not any("base_identity" in name for name in with_memory.state_dict())


def test_remove_memory_forgets_it(plain, memory_config):
    add_memory(plain, memory_config, [2], mode="parallel")
    remove_memory(plain)
    assert base_of(plain) is None


def test_what_was_put_around_modules_does_not_count(memory_config):
    peft = pytest.importorskip("peft")
    model = small("llama")
    before = identity_of(model)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["o_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    assert identity_of(wrapped.get_base_model()) == before
    model = small("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert identity_of(model) == before
    # Replaced behind something that was put around.
    add_memory(model, memory_config, ["model.layers.1._orig_mod.mlp"])
    assert base_of(model) == identity_of(model)


def one_bit(weight):
    weight.data.view(torch.int16)[299, 39] ^= 1


def two_rows(weight):
    weight.data[[7, 200]] = weight.data[[200, 7]]


def two_columns(weight):
    weight.data[:, [3, 4]] = weight.data[:, [4, 3]]


def one_column(weight):
    weight.data[:, 1].neg_()


@pytest.mark.parametrize("change", [one_bit, two_rows, two_columns, one_column])
def test_in_the_process_of_the_model_any_bit_counts(change):
    linear = nn.Linear(40, 300, bias=False, dtype=torch.bfloat16)
    before = identity_of(linear, exact=True)
    assert before.differing(identity_of(linear, exact=True)) == []
    change(linear.weight)
    assert before.differing(identity_of(linear, exact=True)) == ["weight"]


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5, 3), (1024, 3), (7, 1100)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64, torch.bfloat16])
def test_a_digest_is_of_the_values_not_of_where_they_are(shape, dtype):
    module = nn.Module()
    module.register_buffer("t", torch.randn(shape).to(dtype))
    before = identity_of(module, exact=True)
    assert [*before.digests] == ["t"]
    module.t = torch.cat([module.t.flatten()[:1], module.t.flatten()])[1:].view(shape) if module.t.numel() else module.t
    assert before.differing(identity_of(module, exact=True)) == []
    if module.t.ndim == 2:
        module.t = module.t.t().contiguous().t()
        assert before.differing(identity_of(module, exact=True)) == []
    module.t = module.t.contiguous()
    if module.t.numel():
        module.t.view(-1)[-1:].copy_(~module.t.view(-1)[-1:] if dtype == torch.bool else module.t.view(-1)[-1:] + 1)
        assert before.differing(identity_of(module, exact=True)) == ["t"]


def test_rows_at_the_end_are_kept_for_other_processes():
    tokens = nn.Embedding(2000, 16)
    before = BaseIdentity.from_dict(identity_of(tokens).to_dict())
    tokens.weight.data[-8:] += torch.randn(8, 16)
    assert before.differing(identity_of(tokens)) == ["weight"]
    old = before.to_dict()
    del old["tensors"]["weight"]["rows"]  # as in a folder from before there were any
    assert BaseIdentity.from_dict(old).differing(identity_of(tokens)) == []


TUNERS = {
    "LoRA": ("LoraConfig", {"target_modules": ["q_proj"]}),
    "LoRA on embeddings": ("LoraConfig", {"target_modules": ["q_proj", "embed_tokens"]}),
    "DoRA": ("LoraConfig", {"target_modules": ["q_proj"], "use_dora": True}),
    "LoRA and tokens": ("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "LoRA and modules": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [1, 2]}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "VeRA": ("VeraConfig", {"target_modules": ["q_proj"], "r": 2}),
    "LoHa": ("LoHaConfig", {"target_modules": ["q_proj"]}),
    "prompts": ("PromptTuningConfig", {"num_virtual_tokens": 2}),
    "prefixes": ("PrefixTuningConfig", {"num_virtual_tokens": 2}),
    "AdaptionPrompt": ("AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 2}),
}


@pytest.mark.promise(
    "Adapters",
    "a memory beside LoRA, DoRA, trained tokens, `modules_to_save`, IA3, prompts, prefixes or AdaptionPrompt",
    "supported",
    "`freeze_base` leaves the adapters trainable, `save_memory` saves the memory alone",
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tuner", TUNERS)
def test_adapters_of_every_kind_change_no_base(memory_config, tmp_path, tuner):
    peft = pytest.importorskip("peft")
    kind, options = TUNERS[tuner]

    def adapted(model):
        return peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options))

    model = adapted(small("llama"))
    assert identity_of(small("llama")).differing(identity_of(model.get_base_model())) == []
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    models = [freeze_base(add_memory(model, memory_config, [2], mode="parallel"))]
    assert trained
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    now = {name.replace(".base.", ".") for name in now if ".memory." not in name and not name.endswith(".gate")}
    assert now == trained
    if tuner != "AdaptionPrompt":  # it knows models by their type
        models.append(adapted(add_memory(small("llama"), memory_config, [2], mode="parallel")))
    for model in models:
        save_memory(model, tmp_path)
        loaded = load_memory(small("llama"), tmp_path)
        for name, tensor in memory_layers(loaded).popitem()[1].state_dict().items():
            assert torch.equal(tensor, memory_layers(model).popitem()[1].state_dict()[name])


@pytest.mark.promise(
    "Adapters", "LoRA's `layer_replication` of a model with a memory", "refused", "replicate first, then add the memory"
)
def test_blocks_that_were_replicated_since_are_told(memory_config, tmp_path):
    peft = pytest.importorskip("peft")

    def replicated(model):
        config = {"target_modules": ["q_proj"], "layer_replication": [[0, 3], [1, 4]], "task_type": "CAUSAL_LM"}
        return peft.get_peft_model(model, peft.LoraConfig(**config))

    model = replicated(add_memory(small("llama"), memory_config, [3], mode="parallel"))
    with pytest.raises(ValueError, match="layer_replication has moved and copied blocks since: replicate first"):
        save_memory(model, tmp_path)
    model = add_memory(replicated(small("llama")), memory_config, [3], mode="parallel")
    save_memory(model, tmp_path)
    loaded = load_memory(replicated(small("llama")), tmp_path)
    assert [*memory_layers(loaded)] == [*memory_layers(model)]


def test_adapters_that_were_merged_and_unmerged_changed_nothing(memory_config, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(add_memory(small("llama"), memory_config, [2], mode="parallel"), config)
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match="tensors of it have changed since"):
        save_memory(model, tmp_path)
    model.unmerge_adapter()
    assert not torch.equal(weight, before)
    save_memory(model, tmp_path)
    load_memory(small("llama"), tmp_path)
