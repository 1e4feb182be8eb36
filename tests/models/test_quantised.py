"""Memories in bases whose weights are quantised: by bitsandbytes, and by what packs weights as others do."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from memlayers import MemoryConfig, MemoryLayer
from memlayers.models import add_memory, freeze_base, load_memory, memory_layers, remove_memory, save_memory
from memlayers.models.identity import identity_of
from memlayers.models.modules import packed_shape, weight_sizes
from memlayers.models.wrappers import ParallelMemory, find_wrappers

MEMORY = MemoryConfig(dim=64, heads=2, topk=3, num_subkeys=6, query_dim=8, query_norm="rms")
IDS = torch.arange(1, 9)[None]

# It says that it casts, and warns of what transformers passes to it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(params=["4 bits", "nf4", "4 bits in bfloat16", "8 bits"])
def quantisation(request):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        **{
            "4 bits": {"load_in_4bit": True},
            "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "4 bits in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
            "8 bits": {"load_in_8bit": True},
        }[request.param]
    )


def quantised(folder, quantisation, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, device_map="cpu", **options)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def open_gates(model):
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.fill_(1.0)
    return model


@pytest.mark.promise(
    "Quantised models", "`add_memory` to a 4-bit or 8-bit base, train, `save_memory`", "supported", "as to any other"
)
def test_a_memory_in_a_quantised_base(base_folder, quantisation, tmp_path):
    base = quantised(base_folder, quantisation)
    expected = logits(base)  # on a CPU the first call packs weights anew
    model = add_memory(base, MEMORY, [2], mode="parallel")
    assert torch.equal(logits(model), expected)
    freeze_base(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    ((_, wrapper),) = find_wrappers(model)
    assert wrapper.gate.grad.abs().max() > 0
    open_gates(model)
    save_memory(model, tmp_path)
    for load in (
        lambda: load_memory(quantised(base_folder, quantisation), tmp_path),
        lambda: quantised(tmp_path, quantisation),
    ):
        assert torch.equal(logits(load()), logits(model))
    assert torch.equal(logits(remove_memory(model)), expected)


@pytest.mark.promise(
    "Quantised models", "load the memory of a full-precision base into the quantised one", "supported",
    "`load_memory`, or `from_pretrained` with a `quantization_config`; and the other way round",
)  # fmt: skip
def test_one_memory_for_a_base_and_its_quantised_form(base_folder, quantisation, tmp_path):
    model = open_gates(add_memory(AutoModelForCausalLM.from_pretrained(base_folder), MEMORY, [2], mode="parallel"))
    save_memory(model, tmp_path / "full")
    loaded = load_memory(quantised(base_folder, quantisation), tmp_path / "full")
    again = quantised(tmp_path / "full", quantisation)
    assert torch.equal(logits(again), logits(loaded))
    torch.testing.assert_close(logits(loaded), logits(model), atol=0.5, rtol=0)
    save_memory(loaded, tmp_path / "packed")
    back = load_memory(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "packed")
    assert torch.equal(logits(back), logits(model))


@pytest.mark.promise(
    "Quantised models", "`save_pretrained` of a quantised model with a memory", "supported",
    "the memory is on the list of what the quantiser leaves out",
)  # fmt: skip
def test_a_whole_quantised_model_comes_back_with_its_memory_as_it_was(base_folder, quantisation, tmp_path):
    model = open_gates(add_memory(quantised(base_folder, quantisation), MEMORY, [2], mode="parallel"))
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", device_map="cpu")
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", device_map="cpu")
    for other in (loaded, again):
        (memory,) = memory_layers(other).values()
        kinds = {type(part) for part in memory.modules()}
        assert kinds == {type(part) for part in memory_layers(model).popitem()[1].modules()}
        assert type(other.lm_head) is nn.Linear
        assert type(other.model.layers[1].mlp.base.up_proj) is type(model.model.layers[1].mlp.base.up_proj)
        torch.testing.assert_close(logits(other), logits(model), atol=1e-3, rtol=1e-3)


def test_a_full_model_with_a_memory_is_quantised_but_for_the_memory(base_folder, quantisation, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    open_gates(add_memory(base, MEMORY, [2], mode="parallel")).save_pretrained(tmp_path)
    loaded = quantised(tmp_path, quantisation)
    (memory,) = memory_layers(loaded).values()
    assert type(memory.query.projections[0]) is type(memory_layers(base).popitem()[1].query.projections[0])
    assert packed_shape(loaded.model.layers[1].mlp.base.up_proj) == (128, 64)
    assert packed_shape(loaded.lm_head) is None
    torch.testing.assert_close(logits(loaded), logits(base), atol=0.5, rtol=0)


class Packed(nn.Module):
    """What a linear map of other quantisers is made of."""

    def __init__(self, **tensors):
        super().__init__()
        self.in_features, self.out_features = 64, 128
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@pytest.mark.parametrize(
    "tensors",
    [
        {"qweight": torch.zeros(8, 128, dtype=torch.int32), "scales": torch.ones(1, 128)},  # GPTQ
        {"qweight": torch.zeros(64, 16, dtype=torch.int32), "qzeros": torch.zeros(1, 16, dtype=torch.int32)},  # AWQ
        {"W_q": torch.zeros(32, 128, dtype=torch.uint8)},  # HQQ
        {"weight": torch.zeros(128, 64).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
        {"weight": torch.zeros(4096, 1, dtype=torch.uint8)},
    ],
)
def test_other_quantisers_say_what_their_weights_stand_for(tensors):
    packed = Packed(**tensors, bias=torch.ones(128))
    assert packed_shape(packed) == (128, 64)
    assert weight_sizes(nn.Sequential(packed)) == {128, 64}
    assert identity_of(nn.Linear(64, 128)).differing(identity_of(packed)) == ["bias"]
    assert identity_of(nn.Linear(64, 130)).differing(identity_of(packed)) == ["weight", "bias"]


def test_what_is_not_quantised_is_not_taken_for_it():
    for module in (nn.Linear(3, 4), nn.Linear(3, 4, bias=False).half(), nn.Embedding(3, 4), nn.Bilinear(3, 4, 5)):
        assert packed_shape(module) is None
    assert packed_shape(nn.Sequential(nn.Linear(3, 4))) is None


def test_a_memory_beside_a_quantised_map_is_not_taken_for_one():
    beside = ParallelMemory(Packed(weight=torch.zeros(4096, 1, dtype=torch.uint8)), MemoryLayer(MEMORY))
    assert packed_shape(beside) is None
    assert packed_shape(beside.base) == (128, 64)
