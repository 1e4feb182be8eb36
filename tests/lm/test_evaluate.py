import dataclasses
import itertools
import json
import math

import pytest
import torch

from memlayers.cli.model_commands import quality
from memlayers.lm.build import build_model
from memlayers.lm.data import Split
from memlayers.lm.evaluate import Evaluation, evaluate, measure_speed


@pytest.fixture
def model(tiny_config, tiny_corpus):
    return build_model(tiny_config, vocab_size=tiny_corpus.vocab_size, eot_id=tiny_corpus.eot_id)


def naive_nll(model, tokens, context):
    """One forward for each token: how likely it is after the tokens of its window that stand before it."""
    model.eval()
    total = 0.0
    for place in range(1, len(tokens)):
        start = (place - 1) // context * context
        before = torch.tensor([[int(token) for token in tokens[start:place]]])
        with torch.no_grad():
            log_probabilities = model(input_ids=before).logits[0, -1].double().log_softmax(-1)
        total -= log_probabilities[int(tokens[place])].item()
    return total


@pytest.mark.parametrize("context", [16, 7, 6])
def test_every_token_but_the_first_is_predicted_once(model, tiny_corpus, context):
    split = tiny_corpus.validation.prefix(150)
    assert (split.num_tokens - 1) % context, "a shorter window at the end is part of the test"
    evaluation = evaluate(model, split, tokens=150, context=context, batch_windows=3)
    assert evaluation.tokens == split.num_tokens - 1
    assert evaluation.nll == pytest.approx(naive_nll(model, split.tokens, context), rel=1e-5)


@pytest.mark.parametrize("length", [2, 16, 17, 18, 32, 33, 34])
def test_texts_that_end_around_a_full_window(model, tiny_corpus, length):
    part = tiny_corpus.validation
    text = Split(part.tokens[:length], part.documents[:1])
    evaluation = evaluate(model, text, tokens=10**6, context=16)
    assert evaluation.nll == pytest.approx(naive_nll(model, text.tokens, 16), rel=1e-5)


def test_the_text_is_a_prefix_of_whole_documents(model, tiny_corpus):
    evaluation = evaluate(model, tiny_corpus.validation, tokens=200, context=16)
    text = tiny_corpus.validation.prefix(200)
    assert evaluation.tokens == text.num_tokens - 1 < 200
    assert (evaluation.words, evaluation.bytes) == (text.num_words, text.num_bytes)
    (usage,) = evaluation.usage.values()
    assert usage["tokens"] == evaluation.tokens
    assert usage["slots"] == 16


def test_the_batch_changes_nothing(model, tiny_corpus):
    one, many = (
        evaluate(model, tiny_corpus.validation, tokens=300, context=16, batch_windows=windows) for windows in (1, 100)
    )
    assert one.nll == pytest.approx(many.nll, rel=1e-6)
    assert one.usage.keys() == many.usage.keys() == {"transformer.h.1.mlp.memory"}


def test_evaluation_leaves_the_model_as_it_was(model, tiny_corpus):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    evaluate(model, tiny_corpus.validation, tokens=300, context=16)
    assert model.training
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_figures_follow_from_the_sum():
    evaluation = Evaluation(tokens=100, words=40, bytes=250, nll=300.0)
    figures = evaluation.to_dict()
    assert figures["loss"] == 3.0
    assert figures["perplexity"] == pytest.approx(math.exp(3.0))
    assert figures["perplexity_per_word"] == pytest.approx(math.exp(7.5))
    assert figures["bits_per_byte"] == pytest.approx(300 / math.log(2) / 250)
    assert Evaluation(tokens=1, words=1, bytes=1, nll=1e6).perplexity == math.inf


@pytest.mark.parametrize("words", [0, 1])
def test_figures_of_a_text_whose_words_are_not_separated_are_json(words):
    figures = Evaluation(tokens=1000, words=words, bytes=3000, nll=5000.0).to_dict()
    assert figures["perplexity_per_word"] is None
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert "148.41 per token, - per word, " in quality(figures)


def test_in_bfloat16_the_loss_stays_in_float32(model, tiny_corpus):
    exact, rounded = (
        evaluate(model, tiny_corpus.validation, tokens=300, context=16, precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert rounded.nll != exact.nll
    assert rounded.nll == pytest.approx(exact.nll, rel=1e-2)


def test_nothing_to_predict_is_refused(model, tiny_corpus):
    with pytest.raises(ValueError, match="tokens must be at least 2, got 1"):
        evaluate(model, tiny_corpus.validation, tokens=1, context=16)
    part = tiny_corpus.validation
    with pytest.raises(ValueError, match="split must have at least 2 tokens, got 1"):
        evaluate(model, Split(part.tokens[:1], part.documents[:1]), tokens=10, context=16)


def test_speed_is_measured_in_turns(model, tiny_config, tiny_corpus):
    plain = build_model(dataclasses.replace(tiny_config, memory_layers=()), vocab_size=300, eot_id=0)
    turns = []
    for name, each in (("memory", model), ("plain", plain)):
        each.transformer.h[0].register_forward_pre_hook(lambda *_, name=name: turns.append(name))
    speeds = measure_speed(
        {"memory": model, "plain": plain}, tiny_corpus.validation, context=16, new_tokens=4, repeats=3, batch_windows=4
    )
    changes = [turns[0]] + [after for before, after in itertools.pairwise(turns) if before != after]
    assert changes == ["memory", "plain"] * 4  # the first round warms up
    assert len(turns) == 2 * 4 * (1 + 4)  # one full window, four tokens with a cache (the prompt gives the first)
    for speed in speeds.values():
        assert (speed.batch_windows, speed.context, speed.new_tokens, speed.repeats) == (4, 16, 4, 3)
        assert speed.prefill_words_per_s < speed.prefill_tokens_per_s
        assert speed.decode_tokens_per_s > 0
        assert (speed.device, speed.threads) == ("cpu", torch.get_num_threads())


def test_speed_needs_a_window_of_text(model, tiny_corpus):
    part = tiny_corpus.validation
    with pytest.raises(ValueError, match="split must have at least context = 16 tokens, got 10"):
        measure_speed({"memory": model}, Split(part.tokens[:10], part.documents[:1]), context=16)
