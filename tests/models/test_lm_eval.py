"""The evaluation harness, with a task in a folder: memories and padding count as they do in the model alone."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from memlayers import MemoryConfig, add_memory, disable_memory, save_memory
from memlayers.models import causal_lm
from memlayers.models.wrappers import find_wrappers

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # importing it takes seconds, and it warns

TASK = """
task: tea
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
RECORDS = [
    {"question": "tea is", "choices": [" hot", " cold"], "answer": 0},
    {"question": "what is a cup of cold tea ?", "choices": [" a cup .", " cold"], "answer": 1},
]


@pytest.mark.promise(
    "Trainers",
    "lm-eval with a task of one's own, on the folder of a memory",
    "supported",
    "the base comes with it; padding in a batch changes no score",
)
def test_scores_are_those_of_the_model_in_batches_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    vocabulary = ["tea", "is", "hot", "cold", "what", "a", "cup", "of", "?", "."]
    words = {word: number for number, word in enumerate(vocabulary)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=".", pad_token=".", unk_token="?")
    causal_lm("llama", vocab_size=len(words), layers=2, dim=16, heads=2, context=32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    memory = MemoryConfig(dim=16, heads=2, topk=2, num_subkeys=4, query_dim=8, query_norm="rms", value_std=2.0)
    add_memory(model, memory, [1], mode="parallel")
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.fill_(3.0)
    save_memory(model, tmp_path / "facts")
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "tasks" / "tea.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "tasks" / "tea.yaml").write_text(TASK.format(data=data))

    def scores(loaded, batch_size):
        lm = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            lm,
            tasks=["tea"],
            task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
            bootstrap_iters=0,
            log_samples=True,
        )
        samples = sorted(found["samples"]["tea"], key=lambda sample: sample["doc_id"])
        return [score for sample in samples for score, _ in sample["filtered_resps"]]

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "facts").eval()
    expected = []
    for record in RECORDS:
        for choice in record["choices"]:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (record["question"], record["question"] + choice))
            with torch.no_grad():
                logs = loaded(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(whole))
            expected.append(sum(float(logs[place - 1, whole[place]]) for place in places))
    for batch_size in (1, 4):
        assert scores(loaded, batch_size) == pytest.approx(expected, abs=1e-4)
    with disable_memory(loaded):
        assert scores(loaded, 4) != pytest.approx(expected, abs=1e-2)
