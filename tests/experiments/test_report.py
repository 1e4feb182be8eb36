import copy

import pytest

from memlayers.experiments.report import headline, markdown, plot
from memlayers.presentation import perplexity_text

SPEED = {
    "prefill_words_per_s": 5000.0,
    "decode_tokens_per_s": 150.0,
    "batch_windows": 8,
    "context": 256,
    "prompt_tokens": 16,
    "new_tokens": 64,
    "repeats": 5,
    "device": "cpu",
    "threads": 2,
    "precision": "fp32",
}


def model(label, perplexity, *, timed, memory=(), seconds=100.0, ratio=1.0):
    overall = {"usage": 97.86, "kl": 0.683, "top1_usage": 55.12}
    usage = {"transformer.h.2.mlp.memory": {"tokens": 49_000, "slots": 16_384, "overall": overall}} if memory else {}
    return {
        "label": label,
        "memory_layers": list(memory),
        "learning_rate": 2e-3,
        "parameters": {"total": 8_140_544, "values": 4_194_304 if memory else 0},
        "training": {"tokens": 1_000_000, "seconds": seconds, "tokens_per_s": 9000.0, "words_per_s": 3000.0},
        "curve": [
            {"tokens": 500_000, "seconds": seconds / 2, "loss": 5.0},
            {"tokens": 10**6, "seconds": seconds, "loss": 4.0},
        ],
        "validation": {
            "perplexity": perplexity,
            "perplexity_per_word": 2.5e9,
            "bits_per_byte": 1.5,
            "tokens": 49_000,
            "words": 15_000,
            "usage": usage,
        },
        "equal_time": {"seconds": 100.0, "perplexity": timed},
        "test": None,
        "speed": SPEED,
        "prefill_ratio": ratio,
        "decode_ratio": ratio,
    }


@pytest.fixture
def content():
    models = {
        "4-layers": model("4 layers", 120.0, timed=120.0, ratio=1.7),
        "8-layers": model("8 layers", 110.0, timed=150.0, seconds=190.0),
        "4-layers-memory": model("4 layers + memory", 99.0, timed=105.0, memory=(3,), seconds=110.0, ratio=1.5),
    }
    content = {"models": models, "baseline": "8-layers", "hardware": {"cpu": "Some CPU"}}
    return {**content, "headline": headline(content)}


def test_the_headline_says_what_was_measured(content):
    assert content["headline"] == (
        "At equal tokens 4 layers + memory has a validation perplexity of 99.0, 17.5% below 4 layers (120.0) and 10.0% "
        "below 8 layers (110.0); at equal training time 105.0 against 150.0 of 8 layers; it prefills 1.50 and decodes "
        "1.50 times as fast as 8 layers."
    )


def test_the_headline_is_honest_when_the_memory_loses(content):
    models = copy.deepcopy(content["models"])
    models["4-layers-memory"]["validation"]["perplexity"] = 120.0
    models["4-layers-memory"]["prefill_ratio"] = 0.5
    models["8-layers"]["equal_time"]["perplexity"] = None
    sentence = headline({**content, "models": models})
    assert "of 120.0, the same as 4 layers (120.0) and 9.1% above 8 layers (110.0); it prefills 0.50" in sentence
    assert "equal training time" not in sentence
    models["4-layers-memory"]["validation"]["perplexity"] = float("nan")
    assert "not comparable to 4 layers" in headline({**content, "models": models})


def test_every_model_has_a_row_in_both_tables(content):
    text = markdown(content)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for label in ("4 layers", "8 layers", "4 layers + memory"):
        assert sum(row.startswith(f"| {label} |") for row in rows) == 2, label
    assert {row.count("|") for row in rows[:5]} == {8}
    assert "| 4 layers | 8.1 M | - | 120.0 | 120.0 | 2.50e+09 | 1.500 |" in rows
    assert "| 4 layers + memory | 8.1 M | 4.2 M | 99.0 | 105.0 | 2.50e+09 | 1.500 |" in rows
    assert "| 4 layers | 9,000 | 3,000 | 100 | 5,000 | 1.70 | 150 | 1.70 |" in rows
    assert "| 4 layers + memory (`transformer.h.2.mlp.memory`) | 16,384 | 97.9 | 0.68 | 55.1 | 49,000 |" in rows


def test_the_notes_say_how_it_was_measured(content):
    text = markdown(content)
    assert "same 1,000,000 tokens in the same order" in text
    assert "same 49,000 validation tokens (15,000 words)" in text
    assert "After 100 s of training" in text
    assert "not annealed" in text
    assert "interleaved runs in fp32 on Some CPU, 2 threads" in text
    assert "4 layers 0.002" in text
    assert "test" not in text.replace("latest", "")


def test_test_figures_have_columns_of_their_own(content):
    for each in content["models"].values():
        each["test"] = {"perplexity": 123.4, "perplexity_per_word": 5678.9, "tokens": 90_000, "words": 30_000}
    text = markdown(content)
    assert "| test perplexity | test per word |" in text
    assert "| 4 layers | 8.1 M | - | 120.0 | 120.0 | 2.50e+09 | 1.500 | 123.4 | 5,678.9 |" in text
    assert "Test figures are over 90,000 tokens (30,000 words)." in text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (12.345, "12.3"), (123456.7, "123,456.7"), (3.45e10, "3.45e+10")]
)
def test_perplexities_are_readable(value, text):
    assert perplexity_text(value) == text


def test_the_plot_is_two_panels_on_one_scale(content, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def record(self, *args, **kwargs):
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    plot(content, tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    tokens, time = drawn[0].axes
    assert tokens.get_xlabel() == "training tokens (millions)"
    assert time.get_xlabel() == "training time (minutes, evaluation left out)"
    assert tokens.get_ylabel() == "validation loss (nats per token)"
    assert [text.get_text() for text in tokens.get_legend().get_texts()] == [
        "4 layers",
        "8 layers",
        "4 layers + memory",
    ]
    assert tokens.lines[1].get_xydata().tolist() == [[0.5, 5.0], [1.0, 4.0]]
    assert time.lines[1].get_xydata().tolist() == [[95 / 60, 5.0], [190 / 60, 4.0]]
    assert tokens.get_ylim() == time.get_ylim()
