import pytest
import torch

from memlayers.models import add_memory, memory_layers

TOLERANCE = 1e-5  # of logits around 1: other shapes of matrix product round differently


@pytest.fixture
def model(plain, memory_config):
    model = add_memory(plain, memory_config, [2, 4])
    # Memories that matter, and logits that are far apart: with the initial ones every argmax is a near-tie.
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.ndim > 1 else 1
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.randint(0, 40, (8, 16)))
    return model.eval()


def padded_prompt():
    ids = torch.randint(1, 40, (3, 6))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, :1] = 0
    return ids, mask


def generate(model, ids, mask, **options):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


@pytest.mark.promise("Threads and servers", "`generate` with a cache", "supported", "as without, to a tolerance")
def test_cached_agrees_with_uncached(model):
    ids, mask = padded_prompt()
    cached, uncached = (generate(model, ids, mask, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert len(cached.sequences.unique()) > 5
    scale = torch.stack(uncached.logits).abs().max()
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=float(TOLERANCE * scale)
    )


@pytest.mark.promise("Threads and servers", "`generate` with a static cache", "supported", "")
def test_a_static_cache_agrees(model):
    # Its masks come prepared, [B, 1, T, S].
    ids, mask = padded_prompt()
    static = generate(model, ids, mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, generate(model, ids, mask).sequences)


def test_the_memories_matter(model):
    ids, mask = padded_prompt()
    before = generate(model, ids, mask).sequences
    for memory in memory_layers(model).values():
        memory.values.weight.data.zero_()
    assert not torch.equal(generate(model, ids, mask).sequences, before)
