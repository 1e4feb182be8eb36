"""A model without its memories, for the length of a block."""

import copy
import threading

import pytest
import torch
from torch import nn

from memlayers import MemoryConfig, MemoryLayer, disable_memory
from memlayers.models import ParallelMemory, add_memory, causal_lm, remove_memory
from memlayers.models.wrappers import find_wrappers

# PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(12).view(2, 6)


def base_of(family="llama"):
    torch.manual_seed(0)
    return causal_lm(family, vocab_size=40, layers=2, dim=16, heads=2, context=32).eval()


def with_memory(base, **options):
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
    add_memory(model, config, [1], **{"mode": "parallel", **options})
    for _, wrapper in find_wrappers(model):
        if isinstance(wrapper, ParallelMemory):
            nn.init.ones_(wrapper.gate)
    return model


def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.promise(
    "Adapters",
    "switching memories off: `with disable_memory(model):`",
    "supported",
    "the base model's outputs, bit for bit, in this thread; also `generate`, checkpointed and compiled blocks",
)
@pytest.mark.parametrize("options", [{}, {"mode": "replace", "keep_original": True}], ids=["parallel", "replace"])
def test_inside_the_model_is_the_base_and_outside_as_before(options):
    base = base_of()
    model = with_memory(base, **options)
    before = logits(model)
    assert not torch.equal(before, logits(base))
    with disable_memory(model):
        assert torch.equal(logits(model), logits(base))
        with disable_memory(model):
            pass
        assert torch.equal(logits(model), logits(base))
        prompt = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**prompt), base.generate(**prompt))
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyError), disable_memory(model):
        raise KeyError
    assert torch.equal(logits(model), before)


def test_a_kept_module_answers_in_the_dtype_and_the_mode_of_the_model():
    base = base_of("gpt2")
    model = with_memory(base, mode="replace", keep_original=True).to(torch.bfloat16).train()
    base = base.to(torch.bfloat16).train()
    torch.manual_seed(1)
    expected = logits(base)  # with dropout
    torch.manual_seed(1)
    with disable_memory(model):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("cast", [None, torch.float16, torch.float32, torch.bfloat16])
def test_a_kept_module_beside_float16_stays_in_it_until_the_model_is_cast(cast):
    """Beside it a memory is float32 from the start; a cast to float16 casts that, too."""
    base = base_of().half()
    model = with_memory(base, mode="replace", keep_original=True)
    for kept in (model, copy.deepcopy(model)):
        if cast is not None:
            kept.to(cast)
        expected = logits(base.to(cast))
        with disable_memory(kept):
            assert torch.equal(logits(kept), expected)
        assert torch.equal(logits(remove_memory(kept)), expected)


@pytest.mark.promise(
    "Adapters",
    "`disable_memory` where the replaced module was not kept",
    "refused",
    '`add_memory(..., keep_original=True)`, or `mode="parallel"`',
)
def test_without_the_module_that_was_replaced_it_is_refused():
    model = with_memory(base_of(), mode="replace")
    with pytest.raises(ValueError, match=r"has not kept model.layers.0.mlp: use add_memory\(..., keep_original=True\)"):
        disable_memory(model).__enter__()
    alone = nn.Sequential(MemoryLayer(MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)))
    with pytest.raises(ValueError, match="has not kept 0"):
        disable_memory(alone).__enter__()
    with pytest.raises(ValueError, match=r"must have memories \(add_memory\), got a Linear without"):
        disable_memory(nn.Linear(2, 2)).__enter__()


def test_other_threads_keep_their_memories():
    base = base_of()
    model = with_memory(base)
    expected, found = logits(model), []
    inside, done = threading.Event(), threading.Event()

    def call():
        inside.wait(10)
        found.append(logits(model))
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    with disable_memory(model):
        inside.set()
        assert done.wait(10)
        assert torch.equal(logits(model), logits(base))
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("is_off", [True, False], ids=["off", "on"])
def test_a_checkpointed_block_is_repeated_as_it_was_called(is_off, use_reentrant, enable_checkpointing):
    base = base_of()
    model = with_memory(base)
    enable_checkpointing(model, use_reentrant)
    with disable_memory(model):
        pass  # from here on, what is checkpointed knows whether memories are on
    gradients = []
    for subject in (model, base if is_off else with_memory(base)):
        subject.train()
        if is_off and subject is model:
            with disable_memory(model):
                loss = subject(input_ids=IDS, labels=IDS).loss
            loss.backward()
        else:
            loss = subject(input_ids=IDS, labels=IDS).loss
            if subject is model:
                with disable_memory(model):
                    loss.backward()
            else:
                loss.backward()
        gradients.append({name: value.grad for name, value in subject.named_parameters() if value.grad is not None})
    names = {name.replace("mlp.base.", "mlp."): grad for name, grad in gradients[0].items()}
    expected = {name.replace("mlp.base.", "mlp."): grad for name, grad in gradients[1].items()}
    assert names.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(names[name], grad, msg=name)


def test_a_block_checkpointed_before_is_not_repeated_without_its_memory(enable_checkpointing):
    model = with_memory(base_of()).train()
    enable_checkpointing(model, False)
    loss = model(input_ids=IDS, labels=IDS).loss
    with disable_memory(model), pytest.raises(ValueError, match="call backward\\(\\) outside"):
        loss.backward()


def test_a_compiled_module_follows():
    memory = MemoryLayer(MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8))
    model = ParallelMemory(nn.Linear(16, 16), memory).eval()
    nn.init.ones_(model.gate)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 16)
    with torch.no_grad():
        on = compiled(x)
        with disable_memory(compiled):
            torch.testing.assert_close(compiled(x), model.base(x))
        torch.testing.assert_close(compiled(x), on)
    assert not torch.allclose(on, model.base(x))


@pytest.mark.promise(
    "Adapters",
    "PEFT's `disable_adapter()` beside a memory: TRL's reference model",
    "supported",
    "memories are off in its block, too; one whose replaced module was not kept stays on, as a part of the base",
)
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "PrefixTuningConfig"])
def test_peft_s_disable_adapter_switches_memories_off(kind):
    peft = pytest.importorskip("peft")
    base = base_of()
    options = {"PrefixTuningConfig": {"num_virtual_tokens": 2}}.get(kind, {"target_modules": ["q_proj", "k_proj"]})
    if kind == "IA3Config":
        options["feedforward_modules"] = []
    for mode in ("parallel", "replace"):
        expected = logits(base)
        memory_model = with_memory(base, mode=mode, keep_original=True)
        model = peft.get_peft_model(memory_model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "ia3" in name:
                nn.init.ones_(parameter)
        before = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), before)
        assert not torch.allclose(before, expected)


def test_adapters_in_a_replaced_module_are_those_of_the_model():
    # No submodule any more: PEFT switches adapters in the model, and does not find these.
    peft = pytest.importorskip("peft")
    base = base_of()
    plain = logits(base)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(base, config).eval()
    model.add_adapter("second", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5 if ".second." in name else 1.0)
    expected = {}
    for name in ("second", "default"):
        model.set_adapter(name)
        expected[name] = logits(model)
    model = with_memory(model, mode="replace", keep_original=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    with disable_memory(model):
        assert torch.equal(logits(model), expected["default"])
    model.set_adapter("second")
    with disable_memory(model):
        assert torch.equal(logits(model), expected["second"])
    model.set_adapter("default")
    assert torch.equal(logits(remove_memory(model)), expected["default"])


def test_peft_s_disable_adapter_leaves_a_memory_that_is_part_of_the_base():
    peft = pytest.importorskip("peft")
    memory_model = with_memory(base_of(), mode="replace")
    expected = logits(memory_model)
    model = peft.get_peft_model(memory_model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
