"""Adding, loading and removing memories is done as a whole, or not at all."""

import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from memlayers import load_memory, save_memory
from memlayers.models import add_memory, causal_lm, memory_layers, remove_memory
from memlayers.models.classes import MemoryConfigMixin


def base_model():
    torch.manual_seed(0)
    return causal_lm("llama", vocab_size=40, layers=2, dim=16, heads=2, context=32).eval()


def interrupted(number, work):
    """Whether the work came to an end before Ctrl-C at its line of this number, counted in models/."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if "memlayers/models/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)
    return True


def state_of(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    configs = [id(module.config) for module in model.modules() if hasattr(module, "config")]
    return hooks, modules, configs, sorted(vars(model)), [*model.state_dict()], model.all_tied_weights_keys


@pytest.mark.promise(
    "Saving and loading",
    "interrupt `add_memory`, `load_memory` or `remove_memory`",
    "supported",
    "the model is as it was",
)
@pytest.mark.parametrize("how", ["add", "add and keep", "load"])
def test_ctrl_c_anywhere_adds_all_or_nothing(memory_config, tmp_path, how):
    save_memory(add_memory(base_model(), memory_config, [2], mode="parallel"), tmp_path)
    model = base_model()
    plain, number = state_of(model), 1
    work = {
        "add": lambda: add_memory(model, memory_config, [2], mode="parallel"),
        "add and keep": lambda: add_memory(model, memory_config, [2], keep_original=True),
        "load": lambda: load_memory(model, tmp_path),
    }[how]
    while not (interrupted(number, work) or memory_layers(model)):  # on the way back all was done
        assert state_of(model) == plain
        number += 1 + number // 20
    assert number > 50
    assert isinstance(model.config, MemoryConfigMixin)
    there, number = state_of(model), 1
    while not interrupted(number, lambda: remove_memory(model)) and memory_layers(model):
        assert state_of(model) == there
        number += 1 + number // 20
    assert number > 20
    assert type(model) is LlamaForCausalLM
    assert state_of(model)[1] == plain[1]
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
