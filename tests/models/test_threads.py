"""One model, several threads: what a call says about its tokens is that call's alone, and calls overlap in time."""

import queue
import sys
import threading

import pytest
import torch
import transformers as tf
from torch._dynamo.testing import CompileCounterWithBackend

from memlayers import MemoryConfig, UsageMeter
from memlayers.inference import captured_decoding
from memlayers.layer import capturing
from memlayers.models import add_memory, causal_lm, memory_layers
from memlayers.models.calls import in_progress
from memlayers.models.wrappers import find_wrappers

MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
B, T = 2, 8
IDS = torch.randint(2, 40, (B, T), generator=torch.Generator().manual_seed(0))
MASKS = [torch.ones(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)]
MASKS[1][1, :4] = 0

MODELS = {
    "gpt2": lambda: causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=32),
    "llama": lambda: causal_lm("llama", vocab_size=40, layers=2, dim=16, heads=2, context=32),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SIZES, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, bos_token_id=1)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=32)),
}
NAMES = {"opt": r"model\.decoder\.layers\.\d", "bert": r"bert\.encoder\.layer\.\d"}


def build(name="llama", mode="parallel", **options):
    torch.manual_seed(0)
    model = add_memory(MODELS[name](), MEMORY, NAMES.get(name, [1, 2]), mode=mode, **options).eval()
    for _, wrapper in find_wrappers(model):
        if mode == "parallel":
            torch.nn.init.constant_(wrapper.gate, 20.0)
    return model


def in_threads(*functions):
    """What each returns, or the error that it raised; all begin at once."""
    results = [None] * len(functions)

    def run(place, function):
        try:
            results[place] = function()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=numbered) for numbered in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def meet_in(model, parties=2):
    """Each thread waits inside of each memory until all are there."""
    barrier = threading.Barrier(parties, timeout=30)

    def wait(*_):
        barrier.wait()

    for _, wrapper in find_wrappers(model):
        wrapper.register_forward_pre_hook(wait)


def logits(model, mask, ids=IDS, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options).logits


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "llama",
            marks=pytest.mark.promise(
                "Threads and servers", "calls of one model by several threads, with masks", "supported",
                "a mask is that of its call; no lock",
            ),
        ),
        "gpt2",
        "opt",
        "bert",
    ],
)  # fmt: skip
def test_two_calls_that_meet_inside_a_memory_see_their_own_masks(name):
    model = build(name)
    expected = [logits(model, mask) for mask in MASKS]
    assert not torch.allclose(*(one[1, 4:] for one in expected))
    meet_in(model)
    found = in_threads(*(lambda mask=mask: logits(model, mask) for mask in MASKS))
    for ours, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, alone)


def test_masks_of_two_shapes_meet():
    model = build(mode="replace")
    inputs = [(IDS, MASKS[1]), (IDS[:1, :5], MASKS[0][:1, :5])]
    expected = [logits(model, mask, ids) for ids, mask in inputs]
    meet_in(model)
    found = in_threads(*(lambda ids=ids, mask=mask: logits(model, mask, ids) for ids, mask in inputs))
    for ours, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, alone)


@pytest.mark.promise(
    "Threads and servers", "`generate` in several threads, with padding of different lengths", "supported", ""
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_generate_in_threads(name):
    model = build(name)
    prompts = []
    for padding in (0, 3, 5):
        mask = torch.ones_like(IDS)
        mask[0, :padding] = 0
        prompts.append((IDS, mask))

    def generate(ids, mask):
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                              pad_token_id=0)  # fmt: skip

    expected = [generate(*prompt) for prompt in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        found = in_threads(*(lambda prompt=prompt: generate(*prompt) for prompt in prompts))
    finally:
        sys.setswitchinterval(interval)
    for ours, alone in zip(found, expected, strict=True):
        assert torch.equal(ours, alone)


class Numbers:
    """A tokenizer of a streamer."""

    def decode(self, tokens, **_):
        return "".join(f"{token}\n" for token in tokens)


@pytest.mark.promise("Threads and servers", "streams of `TextIteratorStreamer`, several at once", "supported", "")
def test_streams_side_by_side():
    model = build("gpt2")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompts = [{"inputs": IDS[:1], "attention_mask": MASKS[0][:1]}, {"inputs": IDS[1:], "attention_mask": MASKS[1][1:]}]
    expected = [model.generate(**prompt, **options)[0, T:].tolist() for prompt in prompts]
    streams = [tf.TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=60) for _ in prompts]
    in_threads(
        *(
            lambda prompt=prompt, stream=stream: model.generate(**prompt, **options, streamer=stream)
            for prompt, stream in zip(prompts, streams, strict=True)
        )
    )
    assert [[int(number) for number in "".join(stream).split()] for stream in streams] == expected


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_is_repeated_in_another_thread_with_the_mask_of_its_forward(use_reentrant, enable_checkpointing):
    def gradients(model, backward):
        model.train()
        losses = [
            model(input_ids=IDS, attention_mask=mask, use_cache=False).logits[mask.bool()].square().sum()
            for mask in MASKS
        ]
        for loss in losses:
            backward(loss)
        return [p.grad for p in model.parameters()]

    expected = gradients(build(), lambda loss: loss.backward())
    model = build()
    enable_checkpointing(model, use_reentrant)
    found = gradients(model, lambda loss: in_threads(loss.backward))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.promise(
    "Threads and servers", "a forward that ends by Ctrl-C", "supported", "nothing of it is left for the next call"
)
def test_an_interrupt_inside_a_forward_leaves_nothing_for_the_next_call():
    model = build(mode="replace")
    wrappers = [wrapper for _, wrapper in find_wrappers(model)]
    x = torch.randn(B, T, 16)
    expected, alone = logits(model, None), wrappers[0](x)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = wrappers[1].memory.keys.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt) as kept:  # whose traceback holds the frames
        logits(model, MASKS[1])
    handle.remove()
    assert in_progress() == ()
    assert torch.equal(wrappers[0](x), alone)
    assert torch.equal(wrappers[0](x[:, :3]), alone[:, :3])
    assert torch.equal(logits(model, None), expected)
    assert kept.value is not None


def test_a_call_inside_a_call_has_its_own_mask():
    model = build()
    expected = [logits(model, mask) for mask in MASKS]
    inner = []

    def call_again(*_):
        if not inner:
            inner.append(None)
            inner[0] = logits(model, MASKS[0])

    next(iter(find_wrappers(model)))[1].register_forward_pre_hook(call_again)
    assert torch.equal(logits(model, MASKS[1]), expected[1])
    assert torch.equal(inner[0], expected[0])


def test_a_usage_meter_counts_what_threads_call_at_once():
    model = build()
    memory = list(memory_layers(model).values())[-1]
    with UsageMeter(memory) as alone:
        for mask in MASKS:
            logits(model, mask)
    meet_in(model)
    with UsageMeter(memory) as meter:
        in_threads(*(lambda mask=mask: logits(model, mask) for mask in MASKS))
    assert meter.report().tokens == alone.report().tokens == 28
    assert meter.report().overall.count_kl == pytest.approx(alone.report().overall.count_kl)


def test_captured_decoding_is_for_the_thread_that_asks_for_it():
    model = build()
    seen = queue.Queue()
    with captured_decoding(model):
        in_threads(lambda: seen.put(dict(capturing.of)))
        assert len(capturing.of) == 2
    assert seen.get() == capturing.of == {}


def test_single_compiled_blocks_see_the_mask_of_each_call_and_are_compiled_once():
    torch._dynamo.reset()
    model = build()
    expected = [logits(model, mask) for mask in MASKS]
    counter = CompileCounterWithBackend("eager")
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for mask, alone in [*zip(MASKS, expected, strict=True)] * 2:
        torch.testing.assert_close(logits(model, mask, use_cache=False), alone)
        found = in_threads(lambda mask=mask: logits(model, mask, use_cache=False))
        torch.testing.assert_close(found, [alone])
    assert counter.frame_count == 2  # with an attention mask and without, for both blocks
