from types import SimpleNamespace

import pytest

from memlayers.lm.saved import first_token


@pytest.mark.parametrize(
    ("vocab", "bos", "eos", "expected"),
    [({"<|endoftext|>": 5}, 0, 1, 5), ({"a": 5}, 0, 1, 0), ({"a": 5}, None, 1, 1), ({"a": 5}, None, None, None)],
)
def test_a_text_begins_with_the_first_mark_that_its_tokenizer_has(vocab, bos, eos, expected):
    tokenizer = SimpleNamespace(get_vocab=lambda: vocab, bos_token_id=bos, eos_token_id=eos)
    assert first_token(tokenizer) == expected
