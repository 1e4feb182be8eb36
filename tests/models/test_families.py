"""What a memory promises, for each family of decoders whose blocks have a feed-forward module of their own."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from memlayers import MemoryConfig
from memlayers.models import add_memory, freeze_base, memory_layers, remove_memory
from memlayers.models.wrappers import ParallelMemory, find_wrappers
from memlayers.optim import MemoryAdamW

# Logits around 1: other shapes of matrix product round differently.
TOLERANCE = 1e-5

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # logits that are far apart; with the usual 0.02 every argmax is a near-tie
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
WIDE_HEADS = {**GROUPED, "head_dim": 12}  # heads that together are wider than the model
FAMILIES = {
    "GPT2LMHeadModel": ("GPT2Config", SIZES),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", WIDE_HEADS),
    "MistralForCausalLM": ("MistralConfig", {**GROUPED, "sliding_window": 6}),
    "GemmaForCausalLM": ("GemmaConfig", WIDE_HEADS),
    "Gemma2ForCausalLM": ("Gemma2Config", {**WIDE_HEADS, "sliding_window": 6}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**WIDE_HEADS, "sliding_window": 6}),
    "PhiForCausalLM": ("PhiConfig", SIZES),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES),
}
MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
IDS = torch.randint(1, 40, (3, 10), generator=torch.Generator().manual_seed(0))


def build(name, **options):
    config, sizes = FAMILIES[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes, **options)).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def base(request):
    """A model without memories. Not to be changed."""
    return build(request.param)


@pytest.fixture(scope="module")
def settled(base):
    """The same with memories beside blocks 2 and 3 that matter, in evaluation. Not to be changed."""
    return settle(add_memory(copy.deepcopy(base), MEMORY, [2, 3], mode="parallel", share_values=True))


def settle(model):
    torch.manual_seed(1)
    for _, wrapper in find_wrappers(model):
        if isinstance(wrapper, ParallelMemory):
            wrapper.gate.data.uniform_(3.0, 5.0)
    with torch.no_grad():
        for _ in range(20):  # statistics of the query's norm
            model.train()(torch.randint(1, 40, (8, 16)))
    return model.eval()


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model.eval()(ids, **options).logits


def train(model, steps=3):
    optimizer = MemoryAdamW(freeze_base(model), lr=0.01, value_lr=0.01)
    for _ in range(steps):
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release()
    return model.eval()


def assert_is(model, base):
    assert type(model) is type(base)
    assert {type(module.config) for module in model.modules() if hasattr(module, "config")} == {type(base.config)}
    assert model.config.to_dict() == base.config.to_dict()
    assert [*model.state_dict()] == [*base.state_dict()]
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), logits(base))


@pytest.mark.promise(
    "Saving and loading",
    '`add_memory(mode="parallel")` on a pretrained model',
    "supported",
    "the base's outputs, bit for bit, until the gate is trained",
)
def test_a_memory_beside_begins_as_the_base_and_goes_without_a_trace(base):
    expected = logits(base)
    model = add_memory(copy.deepcopy(base), MEMORY, [2, 3], mode="parallel")
    assert type(model).__name__ == f"Memory{type(base).__name__}"
    assert torch.equal(logits(model), expected)
    train(model)
    assert not torch.allclose(logits(model), expected, atol=1e-4)
    assert_is(remove_memory(model), base)


def test_under_autocast_too(base):
    model = add_memory(copy.deepcopy(base), MEMORY, [2, 3], mode="parallel")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model), logits(base))


def test_kept_modules_come_back(base):
    model = add_memory(copy.deepcopy(base), MEMORY, [2, 3], keep_original=True)
    lost = set(base.state_dict()) - set(model.state_dict())
    assert lost
    assert all("layers.1." in name or "layers.2." in name or ".h.1." in name or ".h.2." in name for name in lost)
    names = {name for name, _ in model.named_parameters()}
    assert not names & lost
    assert sum(parameter.shape == (36, 16) for parameter in model.parameters()) == 2
    train(model)
    assert not torch.allclose(logits(model), logits(base), atol=1e-4)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert_is(remove_memory(model), base)


@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_every_parameter_of_a_memory_is_trained(base, mode):
    model = settle(add_memory(copy.deepcopy(base), MEMORY, [2], mode=mode)).train()
    model(IDS, labels=IDS).loss.backward()
    (wrapper,) = (wrapper for _, wrapper in find_wrappers(model))
    parameters = dict(wrapper.memory.named_parameters())
    assert not parameters.pop("values.companion.row_mark").grad.any()  # zero, and stays so
    if mode == "parallel":
        parameters["gate"] = wrapper.gate
    assert len(parameters) == (7 if mode == "parallel" else 6)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # BatchNorm takes away what a bias before it adds.
        assert parameter.grad.abs().max() > (0 if name == "query.projections.0.bias" else 1e-6), name


def test_numbers_names_and_patterns_mean_the_same(base):
    models = [
        add_memory(copy.deepcopy(base), MEMORY, layers, mode="parallel")
        for layers in (
            [1, 3],
            r".*\.(0|2)\.mlp",
            [name for name, _ in base.named_modules() if name.endswith("mlp")][::2],
        )
    ]
    first, *others = [[*memory_layers(model)] for model in models]
    assert len(first) == 2
    assert others == [first, first]
    assert all(name.endswith(".mlp.memory") for name in first)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(base, tied, tmp_path):
    name = type(base).__name__
    model = settle(
        add_memory(build(name, tie_word_embeddings=tied), MEMORY, [2, 3], mode="parallel", share_values=True)
    )
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(report.values())
    assert torch.equal(logits(loaded), logits(model))
    first, second = memory_layers(loaded).values()
    assert first.values is second.values


def generate(model, ids, **options):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, **options
    )


def test_generation(settled, base):
    cached, uncached = (generate(settled, IDS[:, :6], use_cache=use_cache) for use_cache in (True, False))
    assert cached.shape == (3, 14)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, generate(base, IDS[:, :6]))
    beams = generate(settled, IDS[:, :6], num_beams=3)
    assert beams.shape == (3, 14)
    assert torch.equal(beams, generate(settled, IDS[:, :6], num_beams=3, use_cache=False))


def test_left_padding_changes_no_real_token(settled):
    padding = (4, 0, 1)
    mask = torch.ones_like(IDS)
    for row, count in zip(mask, padding, strict=True):
        row[:count] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = logits(settled, attention_mask=mask, position_ids=positions)
    scale = batch.abs().max().item()
    for number, count in enumerate(padding):
        alone = logits(settled, IDS[number : number + 1, count:])
        torch.testing.assert_close(batch[number : number + 1, count:], alone, rtol=0, atol=TOLERANCE * scale)
