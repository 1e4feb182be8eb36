import copy
import dataclasses
import functools
import inspect
import pickle

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from memlayers import MemoryConfig, UsageMeter
from memlayers.models import add_memory, causal_lm, memory_layers
from memlayers.models.calls import in_progress
from memlayers.models.masks import fitted

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
@pytest.mark.parametrize("places", [[0, 1, 2, 3], [1, 2, 3], [3, 0, 1, 2]])  # blocks may be cut off or moved later
def test_checkpointing_changes_no_number(with_memory, enable_checkpointing, places, checkpointing):
    path = next(iter(memory_layers(with_memory))).split(".1.")[0]
    blocks = with_memory.get_submodule(path)
    with_memory.set_submodule(path, nn.ModuleList(blocks[place] for place in places))
    with_memory.config.num_hidden_layers = len(places)
    with_memory.train()
    mask = padding_mask("right")
    ids, other_ids = batch(mask)
    expected = observe(with_memory, ids, mask)
    enable_checkpointing(with_memory, checkpointing == "reentrant")
    assert_same(observe(with_memory, other_ids, mask), expected)


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
        assert in_progress() == ()
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
        memory.register_forward_pre_hook(lambda memory, args, kwargs: seen.append(kwargs.get("mask")), with_kwargs=True)
        for memory in memory_layers(model).values()
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    assert in_progress() == ()
    return seen


def assert_handed(model, call, expected):
    seen = handed_masks(model, call)
    assert len(seen) == len(memory_layers(model))
    for mask in seen:
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected.bool())


def test_the_mask_reaches_the_memory_however_it_is_passed(with_memory):
    mask = padding_mask("left")
    ids, _ = batch(mask)
    embeddings = with_memory.get_input_embeddings()(ids)
    base = with_memory.base_model
    names = list(inspect.signature(base.forward).parameters)
    before = (None,) * (names.index("attention_mask") - 1)  # what comes first differs between versions
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
    assert in_progress() == ()


def prepared(mask: Tensor) -> Tensor:
    """[B, 1, T, T], True where a token may look."""
    return torch.ones(T, T).tril().bool() & mask[:, None, None, :].bool() | torch.eye(T).bool()


@pytest.mark.promise(
    "Masks", "4-D masks (packed sequences) in training, with `query_norm=\"batch\"`", "refused",
    "statistics must not see padding: `query_norm=\"rms\"`, or the norms in evaluation",
)  # fmt: skip
def test_a_prepared_mask_is_refused_where_statistics_are_taken(with_memory):
    mask = padding_mask("right")
    ids, _ = batch(mask)
    with pytest.raises(ValueError, match=r"attention_mask must have 2 dimensions .* got 4 dimensions; .*'rms'"):
        with_memory.train()(ids, attention_mask=prepared(mask), use_cache=False)
    assert in_progress() == ()


@pytest.mark.promise(
    "Masks", "4-D masks (packed sequences) in training, with another `query_norm` or frozen statistics", "supported",
    "all tokens count as real",
)  # fmt: skip
@pytest.mark.parametrize("norm", ["rms", "none", "batch"])
@pytest.mark.parametrize("kind", [bool, float])
def test_a_prepared_mask_trains_where_no_statistics_are_taken(family, plain, memory_config, norm, kind):
    config = dataclasses.replace(memory_config, query_norm=norm)
    model = add_memory(plain, config, [2]).train()
    (memory,) = memory_layers(model).values()
    if norm == "batch":
        memory.query.norm.eval()
    mask = padding_mask("right")
    ids, _ = batch(mask)
    allowed = prepared(mask)
    if kind is float:
        allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with UsageMeter(memory) as meter:
        found = model(ids, attention_mask=allowed, position_ids=positions(mask), use_cache=False).logits[mask.bool()]
    found.square().sum().backward()
    assert memory.values.weight.grad.abs().sum() > 0
    assert meter.report().tokens == B * T
    with torch.no_grad():
        expected = model.eval()(ids, attention_mask=mask, position_ids=positions(mask)).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_prepared_mask_changes_nothing_in_evaluation(with_memory):
    mask = padding_mask("right")
    ids, _ = batch(mask)
    with torch.no_grad():
        expected = with_memory(ids, attention_mask=mask).logits[mask.bool()]
        assert handed_masks(with_memory, lambda: with_memory(ids, attention_mask=prepared(mask))) == [None, None]
        found = with_memory(ids, attention_mask=prepared(mask)).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.promise(
    "Masks", "a mask with more columns than tokens: a static cache, a collator that shifts the tokens only",
    "supported", "the columns of the cache's positions, as in the model without a memory",
)  # fmt: skip
def test_of_a_mask_that_is_too_long_the_columns_of_the_tokens_count(with_memory):
    mask = padding_mask("right")
    ids, _ = batch(mask)
    longer = torch.cat([mask, torch.tensor([[0, 1], [1, 0], [0, 0]])], 1)
    assert_handed(with_memory, lambda: with_memory(ids, attention_mask=longer), mask)
    with torch.no_grad():
        found = with_memory(ids, attention_mask=longer).logits
        assert torch.equal(found, with_memory(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("make", [transformers.DynamicCache, transformers.StaticCache])
def test_with_a_cache_the_columns_are_those_of_its_positions(with_memory, make):
    mask = torch.cat([padding_mask("left"), torch.ones(B, 3, dtype=torch.long)], 1)
    ids = torch.randint(0, 40, mask.shape)
    is_static = make is transformers.StaticCache
    cache = make(config=with_memory.config, **({"max_cache_len": T + 3} if is_static else {}))
    with torch.no_grad():
        whole = with_memory(ids, attention_mask=mask).logits
        for start, stop in ((0, T), (T, T + 1), (T + 1, T + 3)):
            given = mask if is_static else mask[:, :stop]
            found = []

            def step(given=given, start=start, stop=stop, found=found):
                output = with_memory(ids[:, start:stop], attention_mask=given, past_key_values=cache, use_cache=True)
                found.append(output.logits)

            assert_handed(with_memory, step, mask[:, start:stop])
            real = mask[:, start:stop].bool()
            torch.testing.assert_close(found[0][real], whole[:, start:stop][real], rtol=1e-4, atol=1e-5)


@pytest.mark.promise("Masks", "a mask that does not fit the tokens", "refused", "in words, at the call")
def test_a_mask_of_this_call_alone_does_not_fit_a_cache(with_memory):
    ids = torch.randint(0, 40, (B, T))
    ones = torch.ones(B, T, dtype=torch.long)
    with torch.no_grad():
        cache = with_memory(ids, attention_mask=ones, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="for each of the 10 tokens and the 10 before them .* cache, got 10"):
            with_memory(ids, attention_mask=ones, past_key_values=cache)


def test_hidden_states_in_other_arrangements():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    for leading, expected in {
        (2, 3): mask,
        (3, 2): mask.T,
        (6,): mask.reshape(6),
        (4, 2, 3): mask.expand(4, 2, 3),
    }.items():
        assert torch.equal(fitted(mask, torch.Size(leading)), expected)
    assert torch.equal(fitted(mask, torch.Size((6,)), tokens_first=True), mask.T.reshape(6))
    square = torch.tensor([[1, 1], [0, 1]]).bool()
    assert torch.equal(fitted(square, torch.Size((2, 2)), tokens_first=True), square.T)
    for leading in ((2, 4), (1, 6), (5,), (2, 3, 1), ()):
        with pytest.raises(ValueError, match=r"attention_mask must fit the hidden states .* got \[2, 3\] for"):
            fitted(mask, torch.Size(leading))


def xlnet():
    sizes = {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
    return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes)), r"transformer\.layer\.\d\.ff"


def fsmt():
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder")
             for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=40, tgt_vocab_size=40, d_model=16, max_position_embeddings=32, **sizes
    )
    return transformers.FSMTForConditionalGeneration(config), r"model\.encoder\.layers\.\d"


@pytest.mark.promise(
    "Masks", "blocks that work on [tokens, batch, width] (XLNet, FSMT)", "supported", "the mask is turned as they are"
)
@pytest.mark.parametrize("build", [xlnet, fsmt])
@pytest.mark.parametrize("num_tokens", [3, 5])  # of a batch of three: a square one does not show its arrangement
def test_blocks_that_have_tokens_first(build, num_tokens, memory_config):
    torch.manual_seed(0)
    plain, names = build()
    model = add_memory(plain.train(), memory_config, names, mode="parallel")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    mask = torch.ones(3, num_tokens, dtype=torch.long)
    mask[0, 1:], mask[1, 2:] = 0, 0
    memory = next(iter(memory_layers(model).values()))
    seen = []
    memory.register_forward_pre_hook(lambda memory, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True)
    ids = torch.randint(3, 40, mask.shape)
    if model.config.is_encoder_decoder:
        ids[~mask.bool()] = model.config.pad_token_id
    with UsageMeter(memory) as meter:
        model(input_ids=ids, attention_mask=mask)
    assert torch.equal(seen[0], mask.T.bool())
    assert meter.report().tokens == int(mask.sum())


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl:FutureWarning")  # of torch 2.9
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_of_pytorch_s_own_wrapper_keep_the_mask(with_memory, use_reentrant):
    mask = padding_mask("right")
    ids, _ = batch(mask)
    with_memory.train()
    expected = observe(with_memory, ids, mask)
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    blocks = with_memory.get_submodule(next(iter(memory_layers(with_memory))).split(".1.")[0])
    for place, block in enumerate(blocks):
        blocks[place] = checkpoint_wrapper(block, checkpoint_impl=kind)
    found = observe(with_memory, ids, mask)
    gradients = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in found["gradients"].items()}
    for name, gradient in gradients.items():
        if gradient is not None:  # the first block has none: a reentrant checkpoint needs an input with a gradient
            torch.testing.assert_close(gradient, expected["gradients"][name], msg=name)
    assert found["usage"] == expected["usage"]


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


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("llama", False),
        *(pytest.param("gpt2", checkpointing, marks=pytest.mark.slow) for checkpointing in (None, True)),
    ],
)
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
    assert in_progress() == ()
    torch.testing.assert_close(real, eager["real"])
    torch.testing.assert_close(gradients, [*eager["gradients"].values()])
    torch.testing.assert_close(stats, eager["statistics"])


def test_a_head_that_keeps_the_mask_from_its_base_model():
    # RWKV has no use for it; statistics and usage of a memory have.
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, context_length=16))
    config = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
    add_memory(model, config, r"rwkv\.blocks\.1\.feed_forward", mode="parallel")
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    means = []
    for padding in (3, 7):
        fresh = copy.deepcopy(model).eval()
        (memory,) = memory_layers(fresh).values()
        memory.train()
        ids = torch.where(mask.bool(), torch.arange(16).view(2, 8), padding)
        with torch.no_grad():
            fresh(input_ids=ids, attention_mask=mask)
        means.append(memory.query.norm.running_mean)
    assert means[0].any()
    assert torch.equal(*means)
