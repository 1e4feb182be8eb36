"""causal_lm: a plain Hugging Face causal LM with random weights, from a few sizes. Memories come with `add_memory`."""

import math

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from memlayers.checks import require_choice, require_int, require_number

FAMILIES = ("gpt2", "llama")


def causal_lm(
    family: str,
    *,
    vocab_size: int,
    layers: int,
    dim: int,
    heads: int,
    context: int,
    ffn_dim: int | None = None,
    dropout: float = 0.0,
    eos_id: int = 0,
) -> PreTrainedModel:
    """Builds a causal LM with random weights; input and output embeddings are tied.

    Args:
        family: "gpt2", the paper's (learned positions, GELU, LayerNorm, biases), or "llama" (rotary positions, SwiGLU,
            RMSNorm, no biases).
        vocab_size: number of tokens.
        layers: number of blocks.
        dim: width of the model, a multiple of `heads` (for "llama" an even one, for its rotary positions).
        heads: attention heads of a block.
        context: longest sequence, in tokens.
        ffn_dim: width of the feed-forward networks. None: 4 * `dim` for "gpt2"; for "llama", whose networks have three
            matrices, 8/3 * `dim` rounded up to a multiple of 32, which has as many parameters.
        dropout: rate; on embeddings, attention and both residual branches for "gpt2", on attention alone for "llama",
            which has no other.
        eos_id: the token that ends a document; documents also begin with it.

    Raises:
        ValueError: a field that is not allowed, by name.
    """
    require_choice("family", family, FAMILIES)
    sizes = {"vocab_size": vocab_size, "layers": layers, "dim": dim, "heads": heads, "context": context}
    if ffn_dim is not None:
        sizes["ffn_dim"] = ffn_dim
    for name, size in sizes.items():
        require_int(name, size, least=1)
    unit = heads if family == "gpt2" else 2 * heads
    if dim % unit:
        raise ValueError(f"dim must be a multiple of {'' if unit == heads else '2 * '}heads = {unit}, got {dim}")
    require_number("dropout", dropout, least=0.0, below=1.0)
    require_int("eos_id", eos_id, least=0, most=vocab_size - 1)
    model: PreTrainedModel
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=context,
                n_embd=dim,
                n_layer=layers,
                n_head=heads,
                activation_function="gelu_pytorch_tanh",  # that of GPT-2 in one operation instead of eight
                n_inner=4 * dim if ffn_dim is None else ffn_dim,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=eos_id,
                eos_token_id=eos_id,
            )
        )
        # Chosen by the class's name, which GPT-2's does not settle; without it the first loss logs a warning.
        model.loss_type = "ForCausalLM"
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                max_position_embeddings=context,
                hidden_size=dim,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=32 * math.ceil(dim / 12) if ffn_dim is None else ffn_dim,
                attention_dropout=dropout,
                bos_token_id=eos_id,
                eos_token_id=eos_id,
                tie_word_embeddings=True,
            )
        )
    return model
