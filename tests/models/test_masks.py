import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor

from memlayers import MemoryConfig, UsageMeter
from memlayers.models import add_memory, causal_lm, memory_layers

B, T = 3, 10
PADDING = {"left": [4, 0, 1], "right": [4, 0, 1]}


def padding_mask(side: str) -> Tensor:
    mask = torch.ones(B, T, dtype=torch.long)
    for row, count in enumerate(PADDING[side]):
        mask[row, slice(0, count) if side == "left" else slice(T - count, T)] = 0
    return mask


def batch(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches that differ in what their padding holds, and nowhere else."""
    first, second = torch.randint(0, 40, mask.shape), torch.randint(0, 40, mask.shape)
    assert not torch.equal(first, second)
    return first, torch.where(mask.bool(), first, second)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def statistics(model) -> list[Tensor]:
    found = [buffer.clone() for name, buffer in model.named_buffers() if "running_" in name]
    assert len(found) == 4
    return found


def observe(model, ids, mask):
    """All that a step shows: outputs at real tokens, gradients, statistics, usage. The model is left as it was."""
    model = copy.deepcopy(model)
    with UsageMeter(list(memory_layers(model).values())[-1]) as meter:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        real = logits[mask.bool()]
        if model.training:
            real.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} if model.training else {}
    return {"real": real.detach(), "gradients": gradients, "statistics": statistics(model), "usage": meter.report()}


def assert_same(first, second):
    assert torch.equal(first["real"], second["real"])
    assert first["gradients"].keys() == second["gradients"].keys()
    for name, gradient in first["gradients"].items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, second["gradients"][name]), name
    assert all(map(torch.equal, first["statistics"], second["statistics"]))
    assert first["usage"] == second["usage"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
def test_the_contents_of_the_padding_change_nothing_in_training(with_memory, enable_checkpointing, side, checkpointing):
    with_memory.train()
    if checkpointing != "off":
        enable_checkpointing(with_memory, checkpointing == "reentrant")
    mask = padding_mask(side)
    first, second = (observe(with_memory, ids, mask) for ids in batch(mask))
    assert_same(first, second)
    assert first["usage"].tokens == int(mask.sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_contents_of_the_padding_change_nothing_in_evaluation(with_memory, side):
    mask = padding_mask(side)
    with torch.no_grad():
        first, second = (observe(with_memory, ids, mask) for ids in batch(mask))
    assert_same(first, second)
    assert first["usage"].tokens == int(mask.sum())


def test_without_a_mask_padding_counts(with_memory):
    # The control of the tests above: the same two batches do differ where no mask says what is padding.
    with_memory.train()
    all_real = torch.ones(B, T, dtype=torch.long)
    first, second = (observe(with_memory, ids, all_real) for ids in batch(padding_mask("right")))
    assert not torch.equal(first["statistics"][0], second["statistics"][0])
    assert first["usage"].tokens == B * T


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_checkpointing_changes_no_number(with_memory, enable_checkpointing, checkpointing):
    with_memory.train()
    mask = padding_mask("right")
    ids, _ = batch(mask)
    expected = observe(with_memory, ids, mask)
    enable_checkpointing(with_memory, checkpointing == "reentrant")
    assert_same(observe(with_memory, ids, mask), expected)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_two_forwards_before_two_backwards(with_memory, enable_checkpointing, checkpointing):
    masks = padding_mask("left"), padding_mask("right")
    batches = [batch(mask)[0] for mask in masks]

    def gradients(model):
        model.train()
        losses = [
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().sum()
            for ids, mask in zip(batches, masks, strict=True)
        ]
        for loss in losses:
            loss.backward()
        assert all(memory.mask is None for memory in memory_layers(model).values())
        return [p.grad for p in model.parameters()]

    expected = gradients(copy.deepcopy(with_memory))
    enable_checkpointing(with_memory, checkpointing == "reentrant")
    # Not to the bit: reentrant checkpointing adds the parts of a shared parameter's gradient up in another order.
    torch.testing.assert_close(gradients(with_memory), expected, rtol=1e-5, atol=1e-5)


def test_checkpointing_may_come_before_the_memory(plain, memory_config, enable_checkpointing):
    enable_checkpointing(plain, False)
    model = add_memory(plain, memory_config, [2, 3]).train()
    mask = padding_mask("right")
    ids, _ = batch(mask)
    model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().sum().backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin._set_gradient_checkpointing(enable=False)
    twin(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def handed_masks(model, call):
    """The mask that each memory saw during `call`."""
    seen = []
    handles = [
        memory.register_forward_pre_hook(lambda memory, args: seen.append(memory.mask))
        for memory in memory_layers(model).values()
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    assert all(memory.mask is None for memory in memory_layers(model).values())
    return seen


def assert_handed(model, call, expected):
    seen = handed_masks(model, call)
    assert len(seen) == len(memory_layers(model))
    for mask in seen:
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected.bool())


def test_the_mask_reaches_the_memory_however_it_is_passed(with_memory, family):
    mask = padding_mask("left")
    ids, _ = batch(mask)
    embeddings = with_memory.get_input_embeddings()(ids)
    base = with_memory.base_model
    before = (None,) if family == "gpt2" else ()  # past_key_values comes first
    for call in (
        lambda: with_memory(ids, attention_mask=mask),
        lambda: with_memory(ids, *before, mask),
        lambda: with_memory.forward(input_ids=ids, attention_mask=mask),  # as a wrapper like PEFT's does
        lambda: with_memory(inputs_embeds=embeddings, attention_mask=mask),
        lambda: with_memory(ids, attention_mask=mask.float()),
        lambda: base(ids, *before, mask),
        lambda: base(input_ids=ids, attention_mask=mask),
    ):
        assert_handed(with_memory, call, mask)
    assert handed_masks(with_memory, lambda: with_memory(ids)) == [None, None]


def test_cached_decoding_takes_the_columns_of_its_tokens(with_memory):
    mask = torch.cat([padding_mask("left"), padding_mask("right")], 1)
    ids, _ = batch(mask)
    with torch.no_grad():
        cache = with_memory(ids[:, :T], attention_mask=mask[:, :T], use_cache=True).past_key_values
        for start, stop in ((T, T + 5), (T + 5, T + 6), (T + 6, 2 * T)):
            step = functools.partial(
                with_memory, ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
            )
            assert_handed(with_memory, step, mask[:, start:stop])


def test_cached_decoding_counts_each_real_token_once(with_memory):
    mask = torch.cat([padding_mask("left"), padding_mask("right")], 1)
    reports, logits = [], []
    with torch.no_grad():
        for ids in batch(mask):
            with UsageMeter(next(iter(memory_layers(with_memory).values()))) as meter:
                cache, found = None, []
                for start, stop in ((0, T), *((i, i + 1) for i in range(T, 2 * T))):
                    out = with_memory(
                        ids[:, start:stop],
                        attention_mask=mask[:, :stop],
                        position_ids=positions(mask)[:, start:stop],
                        past_key_values=cache,
                        use_cache=True,
                    )
                    cache = out.past_key_values
                    found.append(out.logits)
            reports.append(meter.report())
            logits.append(torch.cat(found, 1)[mask.bool()])
    assert reports[0] == reports[1]
    assert reports[0].tokens == int(mask.sum())
    assert torch.equal(*logits)


def test_a_failed_call_leaves_no_mask(with_memory):
    def fail(*_):
        raise RuntimeError("on purpose")

    mask = padding_mask("left")
    ids, _ = batch(mask)
    last = list(memory_layers(with_memory).values())[-1]
    handle = last.keys.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        with_memory(ids, attention_mask=mask)
    handle.remove()
    assert all(memory.mask is None for memory in memory_layers(with_memory).values())


def prepared(mask: Tensor) -> Tensor:
    """[B, 1, T, T], True where a token may look."""
    return torch.ones(T, T).tril().bool() & mask[:, None, None, :].bool() | torch.eye(T).bool()


def test_a_prepared_mask_is_refused_in_training(with_memory):
    mask = padding_mask("right")
    ids, _ = batch(mask)
    with pytest.raises(ValueError, match=r"attention_mask must have 2 dimensions .* got 4 dimensions"):
        with_memory.train()(ids, attention_mask=prepared(mask), use_cache=False)
    assert all(memory.mask is None for memory in memory_layers(with_memory).values())


def test_a_prepared_mask_changes_nothing_in_evaluation(with_memory):
    mask = padding_mask("right")
    ids, _ = batch(mask)
    with torch.no_grad():
        expected = with_memory(ids, attention_mask=mask).logits[mask.bool()]
        assert handed_masks(with_memory, lambda: with_memory(ids, attention_mask=prepared(mask))) == [None, None]
        found = with_memory(ids, attention_mask=prepared(mask)).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_mask_that_is_too_short_is_refused(with_memory):
    ids = torch.randint(0, 40, (B, T))
    with pytest.raises(ValueError, match="attention_mask must have a column for each of the 10 tokens, got 9"):
        with_memory(ids, attention_mask=torch.ones(B, T - 1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_hands_masks_to_its_own_memories(with_memory, enable_checkpointing, copied):
    if copied is copy.deepcopy:  # with checkpointing enabled, transformers adds a hook of its own that no pickle takes
        enable_checkpointing(with_memory, False)
    mask = padding_mask("right")
    ids, other_ids = batch(mask)
    expected = observe(copy.deepcopy(with_memory).train(), ids, mask)
    twin = copied(with_memory).train()
    first, second = memory_layers(twin).values()
    assert first.values is second.values
    assert not {*memory_layers(twin).values()} & {*memory_layers(with_memory).values()}
    assert_handed(twin, lambda: twin(ids, attention_mask=mask, use_cache=False), mask)
    assert handed_masks(with_memory, lambda: twin(ids, attention_mask=mask, use_cache=False)) == []
    assert_same(observe(copied(with_memory).train(), other_ids, mask), expected)


@pytest.mark.parametrize(("name", "checkpointing"), [("gpt2", None), ("llama", False), ("gpt2", True)])
def test_compiled_in_one_graph(name, checkpointing, enable_checkpointing):
    model = causal_lm(name, vocab_size=40, layers=2, dim=16, heads=2, context=32).train()
    add_memory(model, MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8), [1, 2], share_values=True)
    mask = padding_mask("right")
    ids, other_ids = batch(mask)
    eager = observe(model, ids, mask)
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
    torch._dynamo.reset()

    def step(ids, mask, twin):
        logits = torch.compile(twin, backend="aot_eager", fullgraph=True)(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).logits
        logits[mask.bool()].square().sum().backward()
        return logits[mask.bool()].detach(), [p.grad for p in twin.parameters()], statistics(twin)

    twin = copy.deepcopy(model)
    real, gradients, stats = step(other_ids, mask, twin)
    assert all(memory.mask is None for memory in memory_layers(twin).values())
    torch.testing.assert_close(real, eager["real"])
    torch.testing.assert_close(gradients, [*eager["gradients"].values()])
    torch.testing.assert_close(stats, eager["statistics"])
