"""What add_memory refuses because a memory there would compute something else than the block means."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from memlayers import MemoryConfig
from memlayers.models import add_memory, causal_lm, memory_layers, remove_memory
from memlayers.models.calls import in_progress
from memlayers.models.wrappers import find_wrappers

MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
IDS = torch.randint(1, 40, (3, 10), generator=torch.Generator().manual_seed(0))


def llama(kind=LlamaForCausalLM, config=LlamaConfig):
    torch.manual_seed(0)
    return kind(config(**SIZES, max_position_embeddings=32)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def bloom():
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=3, n_head=2)
    return transformers.BloomForCausalLM(config).eval()


def test_a_module_that_adds_the_residual_itself_is_not_replaced():
    model = bloom()
    before = logits(model)
    with pytest.raises(ValueError, match=r"'transformer\.h\.1\.mlp', which needs hidden_states, residual: use mode="):
        add_memory(model, MEMORY, [2])
    assert not memory_layers(model)
    add_memory(model, MEMORY, [2], mode="parallel")
    assert torch.equal(logits(model), before)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x), x


@pytest.mark.parametrize(
    ("module", "returned"), [(Pair(), "a tuple"), (nn.Flatten(0, 1), r"\[1, 2, 16\] as \[2, 16\]")]
)
def test_a_module_that_returns_something_else_is_not_replaced(module, returned):
    model = nn.ModuleDict({"ffn": module.train()})
    with pytest.raises(ValueError, match=f"got 'ffn', which returns {returned}: use mode='parallel'"):
        add_memory(model, MEMORY, ["ffn"])
    assert model["ffn"] is module
    assert module.training


def test_offloaded_weights_are_refused_and_kept_modules_survive_offloading():
    from accelerate import cpu_offload

    model = llama()
    before = logits(model)
    add_memory(model, MEMORY, [2], keep_original=True)
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(logits(remove_memory(model)), before)
    with pytest.raises(ValueError, match="weights that accelerate has offloaded: add memories first"):
        add_memory(cpu_offload(llama(), execution_device="cpu") or model, MEMORY, [2])


@pytest.mark.promise(
    "Saving and loading",
    'weights that accelerate offloads (`device_map` with `"disk"`)',
    "supported",
    "not of a table that blocks share: accelerate places a module once",
)
def test_a_model_with_memories_on_disk_gives_the_same_outputs(tmp_path):
    model = add_memory(llama(), MEMORY, [2])
    before = logits(model)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=str(tmp_path / "disk"))
    assert all(tensor.is_meta for tensor in loaded.model.layers[1].mlp.memory.parameters())
    torch.testing.assert_close(logits(loaded), before)


def test_adapters_that_were_merged_everywhere_else_are_not_put_back():
    peft = pytest.importorskip("peft")
    model = llama()
    with pytest.warns(FutureWarning):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["gate_proj"]))
    add_memory(wrapped, MEMORY, [2], keep_original=True)
    merged = wrapped.merge_and_unload()
    with pytest.raises(ValueError, match=r"got some in model\.layers\.1\.mlp that were not merged"):
        remove_memory(merged)
    assert memory_layers(merged)


def test_ties_that_a_constructor_declared_survive(tmp_path):
    config = transformers.MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MarianMTModel(config).eval()
    ties = copy.deepcopy(model._tied_weights_keys), dict(model.all_tied_weights_keys)
    add_memory(model, MEMORY, [r"model\.decoder\.layers\.0"], mode="parallel")
    model.save_pretrained(tmp_path)
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()(**batch).logits, expected)
    remove_memory(model)
    assert (model._tied_weights_keys, dict(model.all_tied_weights_keys)) == ties


def test_a_failure_at_the_end_leaves_the_model_as_it_was(monkeypatch):
    from memlayers.models import classes

    def fail(self):
        raise MemoryError

    model = llama()
    before, config, modules = logits(model), model.config, dict(model.named_modules())
    monkeypatch.setattr(classes.MemoryMixin, "declare_memories", fail)
    with pytest.raises(MemoryError):
        add_memory(model, MEMORY, [2], mode="parallel")
    monkeypatch.undo()
    assert type(model) is LlamaForCausalLM
    assert type(model.config) is LlamaConfig
    assert model.config.to_dict() == config.to_dict()
    assert dict(model.named_modules()) == modules
    assert not model.model._forward_pre_hooks
    assert torch.equal(logits(add_memory(model, MEMORY, [2], mode="parallel")), before)


class OwnConfig(LlamaConfig):
    pass


class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig
    config: OwnConfig


class DerivedLlama(LlamaForCausalLM):
    pass


def test_a_class_of_ones_own_takes_nothing_from_the_one_it_is_derived_from(tmp_path):
    add_memory(llama(), MEMORY, [2]).save_pretrained(tmp_path)
    add_memory(llama(OwnLlama, OwnConfig), MEMORY, [2])
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "MemoryLlamaForCausalLM"


def test_a_derived_model_is_saved_and_comes_back(tmp_path):
    model = add_memory(llama(DerivedLlama), MEMORY, [2], mode="parallel").eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model)
    assert torch.equal(logits(copied), logits(model))


FRESH = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    model, ids, expected = pickle.load(file)
assert torch.equal(model(ids).logits, expected)
print(type(model).__name__)
"""


def test_a_pickle_is_read_by_a_process_that_imported_nothing(tmp_path):
    model = add_memory(llama(), MEMORY, [2], mode="parallel").eval()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, IDS, logits(model))))
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path / "model.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "MemoryLlamaForCausalLM", done.stderr


def test_parts_of_a_configuration_stay_shared():
    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 8, "num_key_value_heads": 1},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    text = model.config.text_config
    assert model.model.language_model.config is text
    add_memory(model, MEMORY, [r"model\.language_model\.layers\.1\.mlp"], mode="parallel")
    assert model.config.text_config is model.model.language_model.config is text
    remove_memory(model)
    assert model.config.text_config is text


def clip():
    torch.manual_seed(0)
    text = {**SIZES, "max_position_embeddings": 16, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def test_a_tower_without_masks_is_given_none_and_one_with_masks_its_own():
    names = [r"vision_model\.encoder\.layers\.0\.mlp", r"text_model\.encoder\.layers\.0\.mlp"]
    model = add_memory(clip().eval(), MEMORY, names, mode="parallel")
    seen = {}
    for name, wrapper in find_wrappers(model):
        tower = name.split(".")[0]
        wrapper.memory.register_forward_pre_hook(
            lambda memory, args, kwargs, tower=tower: seen.__setitem__(tower, kwargs.get("mask")), with_kwargs=True
        )
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    with torch.no_grad():
        model(input_ids=IDS[:2, :5], attention_mask=mask, pixel_values=torch.zeros(2, 3, 28, 28))
        assert seen["vision_model"] is None
        assert torch.equal(seen["text_model"], mask.bool())
        seen.clear()
        model.get_text_features(input_ids=IDS[:2, :5], attention_mask=mask)
        assert torch.equal(seen["text_model"], mask.bool())
    assert in_progress() == ()


def test_headless_and_speech_models_are_known_to_their_auto_class():
    assert add_memory(causal_lm("gpt2", vocab_size=9, layers=2, dim=16, heads=2, context=8).transformer, MEMORY, [1])
    from memlayers.models.classes import MemoryGPT2Model, MemoryWhisperForConditionalGeneration

    assert MemoryGPT2Model.auto_class_name == "AutoModel"
    assert MemoryWhisperForConditionalGeneration.auto_class_name == "AutoModelForSpeechSeq2Seq"


def test_a_base_whose_weights_were_renamed_on_loading_comes_back(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=32)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    add_memory(model, MEMORY, [2], mode="parallel").save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_save_of_adapters_leaves_the_whole_model_there(tmp_path):
    peft = pytest.importorskip("peft")
    model = add_memory(llama(), MEMORY, [2], mode="parallel")
    model.save_pretrained(tmp_path)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.memory, self.up = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.up(self.gate(x).sigmoid() * self.memory(x))


def test_names_of_the_module_beside_do_not_collide():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"ffn": Gated()}), torch.randn(2, 5, 16)
    before = model["ffn"](x)
    add_memory(model, MEMORY, ["ffn"], mode="parallel")
    assert torch.equal(model["ffn"](x), before)
    assert model["ffn"].gate.shape == (16,)
    assert isinstance(remove_memory(model)["ffn"].gate, nn.Linear)


@pytest.mark.parametrize("mode", ["parallel", "replace"])
@pytest.mark.parametrize("width", [1, 24])
def test_a_linear_map_to_another_width_is_refused(mode, width):
    # To the one number of a gate, the memory's 16 would be added without an error.
    model = nn.Sequential(nn.Linear(16, width), nn.Linear(width, 16))
    for name in ("0", "1"):
        with pytest.raises(ValueError, match=f"got '{name}', which takes or returns {width}: name the module"):
            add_memory(model, MEMORY, name, mode=mode)
    assert not memory_layers(model)
