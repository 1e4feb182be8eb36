"""Text from a trained model."""

from pathlib import Path
from typing import Any

import torch

from memlayers.checks import require_int, require_number
from memlayers.lm.opened import open_saved
from memlayers.lm.saved import first_token
from memlayers.models.storage import Values

LEAST_TEMPERATURE = 1e-30  # logits that are divided by less are beyond float32


def generate(
    run: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    base: str | None = None,
    memory_values: Values = "memory",
) -> str:
    """Continue `prompt` with a trained model: the prompt and what follows, up to the document's end.

    Args:
        run: folder of a finished run or of a checkpoint in one; or one that `save_pretrained` wrote, with its
            tokenizer; or one that `save_memory` wrote, beside its base, which may have the tokenizer.
        prompt: the beginning of a document; may be empty.
        max_new_tokens: tokens to write at most. With the prompt they must fit into the model's context.
        temperature: of the distribution that is drawn from; 0: the likeliest token each time.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the draws.
        base: of a memory alone, the folder where its base is; None: where it was when the memory was added.
        memory_values: of a memory alone, where its tables are: as `values` of `memlayers.load_memory`.

    Raises `ValueError` for a folder without a model, a bad setting, or a text that does not fit.
    """
    require_int("max_new_tokens", max_new_tokens, least=1)
    require_int("seed", seed, least=0, most=2**64 - 1)
    require_number("temperature", temperature, least=0.0)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt must be valid UTF-8, got {prompt!r}") from error
    saved = open_saved(run, base=base, values=memory_values, field="run")
    model, tokenizer = saved.load(), saved.tokenizer()
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = longest or len(prompt) + max_new_tokens + 1
    if saved.config is None:
        ids = tokenizer.encode(prompt) or [first_token(tokenizer)]
        if ids == [None]:
            raise ValueError("prompt must not be empty for a tokenizer without a token that begins a text")
    else:
        _refuse_endless(prompt, context, tokenizer)
        # Documents begin with this token in training, so a prompt does here.
        ids = [first_token(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False)]
    if len(ids) >= context:
        raise ValueError(
            f"prompt must have at most {context - 1} tokens to leave room for one more in the model's context of "
            f"{context}, got {len(ids)}, the one that begins a document included"
        )
    if len(ids) + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens must be at most {context - len(ids)} to fit into the model's context of {context} tokens "
            f"after a prompt of {len(ids)}, got {max_new_tokens}"
        )
    ids_BT = torch.tensor([ids], device=next(model.parameters()).device)
    draws = temperature >= LEAST_TEMPERATURE
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": 0} if draws else {}
    torch.manual_seed(seed)
    written_BT = model.generate(  # type: ignore[operator]  # transformers mixes it in at run time
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=max_new_tokens,
        do_sample=draws,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **drawing,
    )
    return str(tokenizer.decode(written_BT[0], skip_special_tokens=True))


def _refuse_endless(prompt: str, context: int, tokenizer: Any) -> None:
    """Raises `ValueError` for a prompt that cannot fit, before it is encoded: a long run of letters takes minutes."""
    longest = max(map(len, tokenizer.get_vocab()))  # in the bytes of a token
    if len(prompt) > (context - 1) * longest:
        raise ValueError(
            f"prompt must have at most {context - 1} tokens to leave room for one more in the model's context of "
            f"{context}, got {len(prompt):,} characters"
        )
