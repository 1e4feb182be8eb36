"""Which modules `layers` means, and the models whose blocks have to be named."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from memlayers import MemoryConfig, UsageMeter
from memlayers.models import add_memory, causal_lm, find_layers, freeze_base, memory_layers, remove_memory
from memlayers.models.calls import in_progress
from memlayers.models.targets import choose, default_layer
from memlayers.models.wrappers import find_wrappers
from memlayers.optim import MemoryAdamW

MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
IDS = torch.randint(2, 40, (3, 10), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}

# The class, its configuration, the Auto class, the modules to name, and how it is called in training.
NAMED = {
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(**SIZES, vocab_size=40, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16)
        ),
        AutoModelForCausalLM,
        r"model\.decoder\.layers\.1",
        {"input_ids": IDS, "labels": IDS},
    ),
    "bert": (
        lambda: BertForMaskedLM(BertConfig(**SIZES, vocab_size=40, intermediate_size=24, max_position_embeddings=32)),
        AutoModelForMaskedLM,
        r"bert\.encoder\.layer\.1",
        {"input_ids": IDS, "labels": IDS},
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, decoder_start_token_id=0)
        ),
        AutoModelForSeq2SeqLM,
        r"encoder\.block\.1\.layer\.1|decoder\.block\.1\.layer\.2",
        {"input_ids": IDS, "labels": IDS},
    ),
    "vit": (
        lambda: ViTForImageClassification(
            ViTConfig(**SIZES, intermediate_size=24, image_size=8, patch_size=2, num_labels=3)
        ),
        AutoModelForImageClassification,
        r"vit\.layers\.(0|2)\.mlp",
        {"pixel_values": PIXELS, "labels": torch.arange(3)},
    ),
}


def build(name):
    return NAMED[name][0]().eval()


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("name", NAMED)
def test_named_modules_begin_as_the_base_train_load_and_go(name, tmp_path):
    model = build(name)
    _, auto, layers, batch = NAMED[name]
    base = copy.deepcopy(model)
    expected = logits(base, batch)
    add_memory(model, MEMORY, layers, mode="parallel")
    assert [*memory_layers(model)] == [
        f"{module}.memory" for module, _ in base.named_modules() if re.fullmatch(layers, module)
    ]
    assert torch.equal(logits(model, batch), expected)

    optimizer = MemoryAdamW(freeze_base(model), lr=0.02, value_lr=0.02)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    losses = []
    for _ in range(10):
        loss = model.train()(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    wrappers = dict(find_wrappers(model))
    for wrapper in wrappers:
        assert {f"{wrapper}.gate", f"{wrapper}.memory.values.weight", f"{wrapper}.memory.keys.weight"} <= moved
    assert all(any(key.startswith(f"{wrapper}.") and ".base." not in key for wrapper in wrappers) for key in moved)

    trained = logits(model, batch)
    assert not torch.allclose(trained, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, batch), trained)
    remove_memory(model)
    assert type(model) is type(base)
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize(
    ("name", "block"), [("opt", r"model\.decoder\.layers\.1"), ("bert", r"bert\.encoder\.layer\.1")]
)
def test_numbers_of_blocks_without_one_feed_forward_module_are_refused(name, block):
    model = build(name)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="not one module") as raised:
        add_memory(model, MEMORY, [2], mode="parallel")
    advice = re.search(r'layers=r"(.*)", mode="parallel"', str(raised.value))
    assert advice[1] == block
    assert dict(model.named_modules()) == before
    assert [*memory_layers(add_memory(model, MEMORY, advice[1], mode="parallel"))] == [
        block.replace("\\", "") + ".memory"
    ]


WIDE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {**WIDE, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# What stands for the feed-forward network, the class, its configuration.
NUMBERED = {
    "lfm2": ("feed_forward", "Lfm2ForCausalLM", {**HEADS, "layer_types": ["conv", "full_attention"]}),
    "jamba": (
        "feed_forward",
        "JambaForCausalLM",
        {**HEADS, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
         "attn_layer_period": 2, "attn_layer_offset": 1, "pad_token_id": 0},
    ),
    "llama4_text": (
        "feed_forward",
        "Llama4ForCausalLM",
        {**HEADS, **EXPERTS, "head_dim": 8, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    ),
    "rwkv": ("feed_forward", "RwkvForCausalLM", {**WIDE, "attention_hidden_size": 16, "context_length": 32}),
    "granitemoe": ("block_sparse_moe", "GraniteMoeForCausalLM", {**HEADS, **EXPERTS}),
    "mpt": ("ffn", "MptForCausalLM", {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}),
    "distilbert": (
        "ffn",
        "DistilBertForMaskedLM",
        {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32},
    ),
    "xlnet": ("ff", "XLNetLMHeadModel", {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
}  # fmt: skip


@pytest.mark.promise(
    "Heads and classes", "a block's number where its network is called `feed_forward`, `ffn`, `block_sparse_moe`",
    "supported", "LFM2, Jamba, Llama 4, RWKV, GraniteMoE, MPT, DistilBERT, XLNet",
)  # fmt: skip
@pytest.mark.parametrize("name", NUMBERED)
def test_a_number_takes_the_one_module_that_is_the_network(name):
    own, kind, sizes = NUMBERED[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.AutoConfig.for_model(name, **sizes)).eval()
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask}
    before = logits(model, batch)
    add_memory(model, MEMORY, [2], mode="parallel")
    ((place, wrapper),) = find_wrappers(model)
    assert place.endswith(f".1.{own}")
    assert torch.equal(logits(model, batch), before)
    torch.nn.init.constant_(wrapper.gate, 30.0)
    with UsageMeter(wrapper.memory) as meter:
        after = logits(model, batch)
    assert after.shape == before.shape
    assert not torch.allclose(after[mask.bool()], before[mask.bool()])
    assert meter.report().tokens == int(mask.sum())


def test_a_block_with_two_networks_has_no_number():
    sizes = {**HEADS, **EXPERTS, "shared_intermediate_size": 24}
    config = transformers.GraniteMoeSharedConfig(**sizes)
    with pytest.raises(ValueError, match="is not one module but block_sparse_moe, shared_mlp, got 2. Name the block"):
        add_memory(transformers.GraniteMoeSharedForCausalLM(config), MEMORY, [2])


@pytest.mark.promise(
    "Masks", "blocks whose hidden states have several streams a token (Gemma 3n)", "supported", "all are of its token"
)
@pytest.mark.parametrize("names", [r"model\.layers\.1", r"model\.layers\.1\.mlp"])
def test_a_block_with_streams_takes_a_mask(names):
    config = transformers.Gemma3nTextConfig(
        **HEADS, head_dim=8, hidden_size_per_layer_input=4, vocab_size_per_layer_input=40, laurel_rank=4,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    torch.manual_seed(0)
    model = add_memory(transformers.Gemma3nForCausalLM(config).train(), MEMORY, names, mode="parallel")
    ((_, wrapper),) = find_wrappers(model)
    torch.nn.init.constant_(wrapper.gate, 1.0)
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    with UsageMeter(wrapper.memory) as meter:
        model(input_ids=IDS, attention_mask=mask, labels=IDS).loss.backward()
    assert meter.report().tokens == int(mask.sum()) * (1 if names.endswith("mlp") else config.altup_num_inputs)


def test_numbers_are_refused_where_there_are_two_lists_of_blocks():
    with pytest.raises(ValueError, match=r"T5ForConditional.* 2 lists of them, encoder\.block, decoder\.block"):
        add_memory(build("t5"), MEMORY, [2])


def test_each_half_of_an_encoder_decoder_hands_over_its_own_mask():
    model = add_memory(build("t5"), MEMORY, NAMED["t5"][2], mode="parallel").train()
    masks = torch.ones(2, 3, 10, dtype=torch.long)
    masks[0, 0, 6:] = 0
    masks[1, 1, 8:] = 0
    seen = {}
    for name, memory in memory_layers(model).items():
        memory.register_forward_pre_hook(
            lambda memory, args, kwargs, name=name: seen.update({name.split(".")[0]: kwargs.get("mask")}),
            with_kwargs=True,
        )
    model(input_ids=IDS, decoder_input_ids=IDS, attention_mask=masks[0], decoder_attention_mask=masks[1])
    assert torch.equal(seen["encoder"], masks[0].bool())
    assert torch.equal(seen["decoder"], masks[1].bool())
    assert in_progress() == ()
    model.eval().generate(IDS, attention_mask=masks[0], max_new_tokens=3, num_beams=2)
    assert seen["encoder"].shape == (3, 10)


@pytest.mark.parametrize("half", [r"encoder\.block\.1\.layer\.1", r"decoder\.block\.1\.layer\.2"])
def test_a_memory_in_one_half(half):
    model = add_memory(build("t5"), MEMORY, half, mode="parallel").train()
    ((_, memory),) = memory_layers(model).items()
    memory.register_forward_pre_hook(lambda memory, args, kwargs: seen.append(kwargs.get("mask")), with_kwargs=True)
    seen = []
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 6:] = 0
    model(input_ids=IDS, decoder_input_ids=IDS, attention_mask=mask)
    assert len(seen) == 1
    assert (seen[0] is None) is half.startswith("decoder")


# Names and patterns.


@pytest.fixture
def nested():
    """Modules 0.mlp to 2.mlp, each of two linear maps."""
    blocks = [nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))}) for _ in range(3)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("blocks.1.mlp", [1]),
        (["blocks.2.mlp", "blocks.0.mlp"], [0, 2]),  # in the order of the model
        (r"blocks\.\d\.mlp", [0, 1, 2]),
        ([r".*2\.mlp", "blocks.0.mlp"], [0, 2]),
    ],
)
def test_names_and_patterns(nested, layers, names):
    assert choose(nested, layers) == [f"blocks.{number}.mlp" for number in names]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("blocks.1.mpl", r"got 'blocks\.1\.mpl', which is none; closest are 'blocks\.1\.mlp'"),
        ("blocks.1", r"got 'blocks\.1', which is none"),  # a container, which is not called
        ("mlp", "got 'mlp', which is none"),  # a whole name
        ("blocks.(", r"got 'blocks\.\(' \("),
        ([r"blocks\.\d\.mlp", "blocks.1.mlp"], r"twice, got 'blocks\.1\.mlp' again by 'blocks\.1\.mlp'"),
        (["blocks.1.mlp", "blocks.1.mlp.0"], r"inside of another one, got 'blocks\.1\.mlp\.0' and 'blocks\.1\.mlp'"),
        (["blocks.1.mlp", 2], "all block numbers or all names"),
        (None, "layers must be names of modules, or a regular expression, for a ModuleDict"),
        ([1], "layers must be names of modules, or a regular expression, for a ModuleDict"),
        ([], r"got \[\]"),
    ],
)
def test_what_means_no_module_is_refused(nested, layers, message):
    before = dict(nested.named_modules())
    with pytest.raises(ValueError, match=message):
        add_memory(nested, MEMORY, layers)
    assert dict(nested.named_modules()) == before


def test_another_width_is_refused(nested):
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp' is given and returns, got 12, .* \(they have 16\)"):
        add_memory(nested, MemoryConfig(dim=12, topk=2, num_subkeys=4, query_dim=4), "blocks.0.mlp")


def test_the_default_is_three_quarters_up():
    assert [default_layer(count) for count in (1, 4, 6, 12, 24)] == [1, 3, 5, 9, 18]


def test_what_layers_may_be_is_listed_and_taken():
    llama = causal_lm("llama", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    places = find_layers(llama)
    both = ("replace", "parallel")
    assert [tuple(place) for place in places] == [
        (1, "model.layers.0.mlp", 16, both),
        (2, "model.layers.1.mlp", 16, both),
    ]
    opt = NAMED["opt"][0]()
    blocks = find_layers(opt)
    assert [(place.layers, place.modes) for place in blocks] == [
        (f"model.decoder.layers.{number}", ("parallel",)) for number in range(3)
    ]
    for model, found in ((llama, places), (opt, blocks)):
        for mode in found[0].modes:
            layers = [place.layers for place in found]
            assert len(memory_layers(add_memory(copy.deepcopy(model), MEMORY, layers, mode=mode))) == len(found)
    for model in (nn.Linear(16, 16), NAMED["t5"][0]()):
        with pytest.raises(ValueError, match="layers must be names of modules"):
            find_layers(model)


def test_a_module_with_a_memory_beside_it_is_listed_for_another_one_beside_it():
    model = causal_lm("llama", vocab_size=40, layers=2, dim=16, heads=2, context=32)
    add_memory(model, MEMORY, [1], mode="parallel", name="news")
    assert [place.modes for place in find_layers(model)] == [("parallel",), ("replace", "parallel")]
    add_memory(model, MEMORY, ["model.layers.1"], mode="parallel", name="law")
    assert [place.name for place in find_layers(model)] == ["model.layers.0.mlp", "model.layers.1.base.mlp"]
