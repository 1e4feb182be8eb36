"""LoRA on the model, and memories: both are trained, and the table is there once."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from memlayers import (
    Experts,
    MappedFile,
    MemoryConfig,
    MemoryLayer,
    MemoryPlus,
    load_memory,
    quantize_memory,
    save_memory,
)
from memlayers.models import (
    MemoryLlamaForCausalLM,
    add_memory,
    causal_lm,
    freeze_base,
    memory_layers,
    memory_summary,
    remove_memory,
)
from memlayers.models.wrappers import find_wrappers
from memlayers.optim import MemoryAdamW

# peft asks transformers by a name that was renamed there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
ATTENTION = ["q_proj", "v_proj"]
IDS = torch.arange(24).view(2, 12)


def base():
    return causal_lm("llama", vocab_size=40, layers=3, dim=16, heads=2, context=32)


def lora(model, target_modules=ATTENTION, **options):
    return get_peft_model(model, LoraConfig(target_modules=target_modules, r=2, task_type="CAUSAL_LM", **options))


def memory_first(target_modules=ATTENTION, **options):
    return lora(add_memory(base(), MEMORY, [2], mode="parallel"), target_modules, **options)


def lora_first(target_modules=ATTENTION):
    return add_memory(lora(base(), target_modules), MEMORY, [2], mode="parallel")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model, steps=4):
    optimizer = MemoryAdamW(model, lr=0.05, value_lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    return optimizer


def table(model):
    (memory,) = memory_layers(model).values()
    return memory.values.weight


@pytest.mark.promise("Adapters", "LoRA and a memory, put in in either order", "supported", "`freeze_base` last")
@pytest.mark.parametrize("make", [memory_first, lora_first])
@pytest.mark.parametrize("target_modules", [ATTENTION, "all-linear"])
def test_both_are_trained_and_the_table_is_there_once(make, target_modules):
    model = make(target_modules)
    expected = logits(model)
    assert freeze_base(model) is model
    address = table(model).data_ptr()
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    train(model)

    moved = {name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))}
    # A bias that BatchNorm takes away may rest, and the companion of a table does.
    still = {name for name in trainable - moved if not name.endswith(("bias", "row_mark"))}
    assert not still
    assert moved <= trainable
    wrong = {name for name in moved if ".lora_" not in name and ".memory." not in name and not name.endswith(".gate")}
    assert not wrong
    assert any("q_proj.lora_B" in name for name in moved)
    assert any(name.endswith("values.weight") for name in moved)
    assert table(model).grad is None
    tables = [parameter for parameter in model.parameters() if parameter.shape == (36, 16)]
    assert [parameter.data_ptr() for parameter in tables] == [address]
    assert sum(key.endswith("values.weight") for key in model.state_dict()) == 1
    assert not torch.allclose(logits(model), expected, atol=1e-3)


@pytest.mark.parametrize("make", [memory_first, lora_first])
def test_a_new_adapter_and_a_new_memory_begin_as_the_base(make):
    torch.manual_seed(0)
    plain = base()
    torch.manual_seed(0)
    assert torch.equal(logits(make()), logits(plain))


@pytest.mark.promise("Adapters", "`merge_and_unload` of a model with a memory", "supported", "the memory stays")
@pytest.mark.parametrize("make", [memory_first, lora_first])
@pytest.mark.parametrize("target_modules", [ATTENTION, "all-linear"])
def test_merging_keeps_the_memory(make, target_modules):
    model = freeze_base(make(target_modules))
    train(model)
    expected, address = logits(model), table(model).data_ptr()
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "MemoryLlamaForCausalLM"
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert table(merged).data_ptr() == address
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert type(remove_memory(merged)).__name__ == "LlamaForCausalLM"


@pytest.mark.promise(
    "Adapters", "adapters on the linear maps of a memory (`all-linear`)", "supported", "they count in evaluation, too"
)
def test_an_adapter_on_the_memory_itself_counts_in_evaluation_as_in_training():
    # "all-linear" takes the query's linear map, too. Without gradients a memory runs as one operation, which knows
    # nothing of adapters: it must not be used then.
    model = memory_first("all-linear")
    (memory,) = memory_layers(model).values()
    for name, parameter in memory.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.eval()
    x = torch.randn(5, 16)
    with torch.no_grad():
        fast = memory(x)
    torch.testing.assert_close(fast, memory(x), rtol=0, atol=1e-6)
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(fast, memory(x), atol=1e-3)


def test_the_memory_can_be_excluded():
    model = memory_first("all-linear", exclude_modules=r".*\.memory\..*")
    names = [name for name, _ in model.named_parameters() if "lora" in name]
    assert any(".mlp.base.up_proj." in name for name in names)
    assert not any(".memory." in name for name in names)


def test_every_linear_map_of_a_gated_memory_may_carry_an_adapter():
    model = lora(add_memory(base(), MEMORY, [2], mode="parallel", kind=MemoryPlus), "all-linear")
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.fill_(1.0)
    train(freeze_base(model))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_adapters_that_were_frozen_stay_so():
    model = memory_first()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    freeze_base(model)
    for name, parameter in model.named_parameters():
        is_trained = "lora_B" in name or ".memory." in name or name.endswith(".gate")
        assert parameter.requires_grad is is_trained, name


@pytest.mark.promise(
    "Adapters",
    "PEFT's `modules_to_save` with a memory in it",
    "refused",
    "leave memories out: `freeze_base` has them trained",
)
def test_a_copy_of_the_table_is_refused():
    model = memory_first(modules_to_save=["memory"])
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"got \S+\.memory\.\S+: leave memories out of modules_to_save"):
        freeze_base(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_the_summary_has_a_line_for_adapters():
    model = freeze_base(memory_first())
    parts = memory_summary(model, MemoryAdamW(model)).parts
    assert parts["adapters"].trainable == parts["adapters"].parameters == 3 * 2 * 2 * 2 * 16
    assert parts["base"].trainable == 0
    assert "adapters" not in memory_summary(add_memory(base(), MEMORY, [2])).parts


@pytest.mark.promise("Masks", "masks through a PEFT model", "supported", "")
def test_masks_reach_the_memory_through_the_adapter():
    model = freeze_base(memory_first()).train()
    (memory,) = memory_layers(model).values()
    seen = []
    memory.register_forward_pre_hook(lambda memory, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True)
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    model(input_ids=IDS, attention_mask=mask)
    assert torch.equal(seen[0], mask.bool())


@pytest.mark.promise(
    "Adapters",
    "`save_pretrained` of a PEFT model with a memory",
    "supported",
    "saves the adapter; `save_memory` beside it, or `SaveMemory` in Trainer, the memory",
)
def test_an_adapter_is_saved_without_the_memory_and_loaded_beside_it(tmp_path):
    model = freeze_base(memory_first())
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 4096
    with_memory = copy.deepcopy(model).unload()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(with_memory, tmp_path)), expected, rtol=0, atol=1e-6)


def test_adapters_beside_a_memory_or_on_it_come_with_every_class(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = add_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), MEMORY, [2], mode="parallel")
    nn.init.ones_(model.model.layers[1].mlp.gate)
    save_memory(model, tmp_path / "memory")
    wrapped = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "memory"), init_lora_weights=False)
    for folder in (tmp_path / "adapter", tmp_path / "memory"):
        wrapped.save_pretrained(folder)
        for kind in (AutoModelForCausalLM, MemoryLlamaForCausalLM):
            loaded = kind.from_pretrained(folder)
            assert torch.equal(logits(loaded), logits(wrapped)), (folder, kind)
            assert loaded.name_or_path == str(tmp_path / "memory")


def test_generation_with_beams():
    model = freeze_base(memory_first())
    train(model)
    options = {"max_new_tokens": 5, "num_beams": 2, "attention_mask": torch.ones(2, 6), "pad_token_id": 0}
    model.eval()
    cached, uncached = (model.generate(input_ids=IDS[:, :6], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.promise(
    "Adapters",
    "`get_peft_model` on a model with a memory that was to be trained, then training",
    "supported",
    "PEFT freezes the memory, which a warning says in the first training step; `freeze_base(model)` lets it be trained",
)
def test_a_memory_that_peft_has_frozen_says_so_when_it_is_trained():
    model = memory_first()
    model.eval()(input_ids=IDS)
    with pytest.warns(UserWarning, match=r"frozen it. Call memlayers.models.freeze_base\(model\) before the optimizer"):
        model.train()(input_ids=IDS)
    model(input_ids=IDS)  # once; from here on a warning is an error
    freeze_base(memory_first()).train()(input_ids=IDS)
    on_purpose = add_memory(base(), MEMORY, [2], mode="parallel").requires_grad_(False)
    lora(on_purpose).train()(input_ids=IDS)
    quantised = quantize_memory(add_memory(base(), MEMORY, [2], mode="parallel"), 8)  # which nobody can train
    lora(quantised).train()(input_ids=IDS)


@pytest.mark.promise(
    "Adapters",
    "`model.add_adapter(LoraConfig(...))` of a model with a memory, and its `save_pretrained`",
    "supported",
    "warnings say that the memory is frozen (`freeze_base(model)`), and that adapters alone are saved (`save_memory`)",
)
def test_adapters_that_transformers_puts_on_a_memory_say_what_they_do_to_it(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = add_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), MEMORY, [2], mode="parallel")
    nn.init.ones_(model.model.layers[1].mlp.gate)
    model.add_adapter(LoraConfig(target_modules=ATTENTION, init_lora_weights=False))
    with pytest.warns(UserWarning, match=r"frozen it. Call memlayers.models.freeze_base\(model\) before the optimizer"):
        model.train()(input_ids=IDS)
    save_memory(model, tmp_path / "memory")
    # From the base alone it would come back without the memory.
    with pytest.warns(UserWarning, match=r"has written the adapters alone to .*adapter'.*: save_memory\(model, "):
        model.save_pretrained(tmp_path / "adapter")
    freeze_base(model)
    assert memory_layers(model).popitem()[1].values.weight.requires_grad
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")  # base and memory
    freeze_base(loaded)
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    with pytest.warns(UserWarning, match="frozen it"):
        loaded.train()(input_ids=IDS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    loaded.add_adapter(LoraConfig(target_modules=[*ATTENTION, "up_proj"], init_lora_weights=False))
    loaded.save_pretrained(tmp_path / "both")  # nothing is lost: the memory is where the model came from
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "both")), logits(loaded))
    freeze_base(loaded)
    with pytest.warns(UserWarning, match="has written the adapters alone"):  # and not the memory as it is trained
        loaded.save_pretrained(tmp_path / "both")


@pytest.mark.promise(
    "Adapters",
    "adapters of PEFT beside a memory whose tables are in files or mapped: `save_pretrained`, `from_pretrained`",
    "supported",
    "the adapters alone, which need no `state_dict` of tables",
)
def test_adapters_are_saved_and_loaded_beside_tables_in_files(tmp_path):
    plain = base()
    save_memory(add_memory(copy.deepcopy(plain), MEMORY, [2], mode="parallel"), tmp_path / "memory")
    for name, put in (
        ("mapped", lambda model: load_memory(model, tmp_path / "memory", values="mapped")),
        ("files", lambda model: add_memory(model, MEMORY, [2], mode="parallel", values=MappedFile(tmp_path / "table"))),
    ):
        model = lora(put(copy.deepcopy(plain)), init_lora_weights=False)
        expected = logits(model)
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="mapped is in no state_dict|rows that were never written"):
            model.state_dict()
        again = model.unload()
        assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / name)), expected)
    own = load_memory(copy.deepcopy(plain), tmp_path / "memory", values="mapped")
    own.load_adapter(tmp_path / "mapped")  # of transformers
    own.save_pretrained(tmp_path / "own")
    again = load_memory(plain, tmp_path / "memory", values="mapped")
    again.load_adapter(tmp_path / "own")
    assert torch.equal(logits(again), logits(own))


@pytest.mark.promise(
    "Adapters",
    "LoRA on the table itself: `target_parameters=[...values.weight]`",
    "supported",
    "of `Experts` on one of its two; it merges; each call computes the whole table, so train it by rows where you can",
)
@pytest.mark.parametrize(
    ("kind", "table"),
    [(MemoryLayer, "values"), (MemoryPlus, "values"), (Experts, "values"), (Experts, "values.inputs")],
)
def test_adapters_on_the_table_itself_are_called_trained_and_merged(kind, table):
    model = add_memory(base(), MEMORY, [2], mode="parallel", kind=kind)
    torch.nn.init.ones_(model.get_submodule("model.layers.1.mlp").gate)
    before = logits(model)
    model = lora(model, target_parameters=[f"memory.{table}.weight"])
    assert torch.allclose(logits(model), before, atol=1e-6)
    (b,) = [one for name, one in model.named_parameters() if f"{table}.lora_B" in name]
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert b.grad.any()
    torch.nn.init.ones_(b)
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-4)
    assert torch.allclose(logits(model.merge_and_unload()), adapted, atol=1e-5)
