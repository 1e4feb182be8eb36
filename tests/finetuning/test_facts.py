"""Batches of facts, and batches that look like them and are not."""

import pytest
import torch

from memlayers.finetuning import facts_batch
from memlayers.finetuning.facts import faults_of_facts


class Words:
    """A tokenizer: a word is its length."""

    pad_token_id, eos_token_id = None, 9
    starts, ends = [8], []

    def __call__(self, text, add_special_tokens=True):
        ids = [len(word) for word in text.split()]
        return {"input_ids": [*self.starts, *ids, *self.ends] if add_special_tokens else ids}


def test_the_loss_is_that_of_answers_and_their_end():
    batch = facts_batch(Words(), ["a bb ccc", "a"], ["dddd", "ee fff"])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[8, 1, 2, 3, 4, 9], [8, 1, 2, 3, 9, 9]],
        "attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]],
        "labels": [[-100, -100, -100, -100, 4, 9], [-100, -100, 2, 3, 9, -100]],
    }
    assert faults_of_facts(batch, [8]) == {}


def test_a_tokenizer_that_ends_each_text_or_has_no_end():
    ending, endless = Words(), Words()
    ending.ends, endless.eos_token_id, endless.pad_token_id = [9], None, 5
    assert facts_batch(ending, ["a bb"], ["ccc"])["input_ids"].tolist() == [[8, 1, 2, 3, 9]]
    batch = facts_batch(endless, ["a bb", "a"], ["ccc", "dddd"])
    assert batch["input_ids"].tolist() == [[8, 1, 2, 3], [8, 1, 4, 5]]


@pytest.mark.parametrize(
    ("prompts", "answers", "named"),
    [
        (["a"], ["b", "c"], "as many answers as prompts, at least 1, got 2 and 1"),
        ([], [], "got 0 and 0"),
        (["a"], [" "], "at least one token, got ' ' for 'a'"),
        ("ab", ["c", "d"], "prompts must be a list of texts, got the text 'ab'"),
        (["a"], "b", "answers must be a list of texts, got the text 'b'"),
    ],
)
def test_facts_without_answers_are_refused(prompts, answers, named):
    with pytest.raises(ValueError, match=named):
        facts_batch(Words(), prompts, answers)


def test_a_prompt_without_tokens_is_refused():
    bare = Words()
    bare.starts = []
    with pytest.raises(ValueError, match="each prompt must have at least one token, got '' for 'a'"):
        facts_batch(bare, [""], ["a"])


def test_a_loss_over_questions_is_seen():
    ids = torch.tensor([[8, 1, 2, 3, 9], [8, 1, 3, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = torch.where(mask == 1, ids, -100)
    (kind,) = found = faults_of_facts({"input_ids": ids, "labels": labels, "attention_mask": mask}, [8])
    assert kind == "prompt"
    assert found["prompt"].startswith("the loss covers all tokens of 2 rows of at most 5:")
    assert "prompt" in faults_of_facts({"input_ids": ids, "labels": labels}, [])  # padding is what has no label
    labels[0, 1] = -100  # one row has a question
    assert faults_of_facts({"input_ids": ids, "labels": labels, "attention_mask": mask}, [8]) == {}


def test_packed_facts_are_seen():
    ids = torch.tensor([[8, 1, 2, 9, 8, 3, 4, 9, 8, 5, 6, 9]] * 2)
    labels = torch.where(torch.isin(ids, torch.tensor([2, 4, 6])), ids, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    assert faults_of_facts(batch, [8])["packed"].startswith("6 short texts are packed into 2 rows, and each sees those")
    apart = torch.tensor([[1] * 4 + [2] * 4 + [3] * 4] * 2)
    for keeps_apart in (
        {"attention_mask": apart},
        {"attention_mask": torch.ones(2, 1, 12, 12)},
        {"position_ids": torch.arange(12) % 4},
        {"cu_seq_lens_q": torch.tensor([0, 4, 8, 12])},
    ):
        assert faults_of_facts(batch | keeps_apart, [8]) == {}
    assert faults_of_facts(batch, []) == {}


@pytest.mark.parametrize("length", [65, 400])
def test_long_text_is_meant_to_be_learned_whole(length):
    ids = torch.randint(10, 20, (2, length))
    ids[:, ::200] = 8
    assert faults_of_facts({"input_ids": ids, "labels": ids.clone()}, [8]) == {}


def test_what_is_no_batch_of_tokens_is_left_alone():
    x = torch.randn(2, 3)
    for batch in ({}, {"input_ids": x[0], "labels": x[0]}, {"inputs_embeds": x, "labels": x}, {"input_ids": x}):
        assert faults_of_facts(batch, [8]) == {}
