import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from memlayers.models import causal_lm

SIZES = {"vocab_size": 50, "layers": 3, "dim": 24, "heads": 4, "context": 16}


def test_gpt2_is_the_papers():
    model = causal_lm("gpt2", **SIZES)
    assert type(model) is GPT2LMHeadModel
    assert len(model.transformer.h) == 3
    assert model.transformer.wpe.weight.shape == (16, 24)
    assert model.transformer.h[0].attn.num_heads == 4
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (24, 96)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_llama_has_as_many_ffn_parameters():
    sizes = {**SIZES, "dim": 96, "layers": 1}
    llama, gpt2 = causal_lm("llama", **sizes), causal_lm("gpt2", **sizes)
    assert type(llama) is LlamaForCausalLM
    assert llama.model.layers[0].self_attn.head_dim == 24
    assert llama.config.max_position_embeddings == 16
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    ffn = [sum(w.numel() for w in block.mlp.parameters() if w.ndim == 2) for block in
           (llama.model.layers[0], gpt2.transformer.h[0])]  # fmt: skip
    assert ffn[0] == ffn[1] == 8 * 96**2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_options_arrive(name):
    model = causal_lm(name, **SIZES, ffn_dim=40, dropout=0.25, eos_id=7)
    assert (model.config.eos_token_id, model.config.bos_token_id, model.generation_config.eos_token_id) == (7, 7, 7)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == ({0.25} if name == "gpt2" else set())
    assert (model.config.attn_pdrop if name == "gpt2" else model.config.attention_dropout) == 0.25
    widths = {w.shape[0] for block in model.base_model.children() if isinstance(block, torch.nn.ModuleList)
              for w in block[0].mlp.parameters()}  # fmt: skip
    assert 40 in widths


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_trains_and_says_nothing(name, caplog):
    model = causal_lm(name, **SIZES)
    ids = torch.randint(0, 50, (2, 16))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert 3.5 < loss < 4.5  # ln 50 = 3.9
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert", {}, "family must be one of 'gpt2', 'llama', got 'bert'"),
        ("gpt2", {"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ("gpt2", {"layers": 1.5}, r"layers must be an integer of at least 1, got 1\.5"),
        ("gpt2", {"dim": True}, "dim must be an integer of at least 1, got True"),
        ("gpt2", {"heads": -4}, "heads must be an integer of at least 1, got -4"),
        ("gpt2", {"context": None}, "context must be an integer of at least 1, got None"),
        ("gpt2", {"ffn_dim": 0}, "ffn_dim must be an integer of at least 1, got 0"),
        ("gpt2", {"dim": 26}, "dim must be a multiple of heads = 4, got 26"),
        ("llama", {"dim": 28}, r"dim must be a multiple of 2 \* heads = 8, got 28"),
        ("gpt2", {"dropout": 1.0}, "dropout must be a finite number of at least 0 and below 1, got 1.0"),
        ("gpt2", {"dropout": "0.1"}, "dropout must be a finite number of at least 0 and below 1, got '0.1'"),
        ("gpt2", {"eos_id": 50}, "eos_id must be an integer from 0 to 49, got 50"),
    ],
)
def test_errors_name_the_field(name, change, message):
    with pytest.raises(ValueError, match=message):
        causal_lm(name, **{**SIZES, **change})
