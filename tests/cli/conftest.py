import pytest

from memlayers.cli import main


@pytest.fixture
def refused(capsys):
    """The line that wrong arguments leave on standard error; nothing else is printed."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.startswith("memlayers: error: ")
        assert err.count("\n") == 1
        return err.removeprefix("memlayers: error: ").rstrip("\n")

    return run


@pytest.fixture
def trainings(monkeypatch):
    """What `train` is called with instead of training: (configuration, output, settings) of each call."""
    import memlayers.cli.training_commands as module

    calls = []

    def train(config, output, **settings):
        calls.append((config, output, settings))
        return {
            "parameters": {"total": 1},
            "training": {"tokens": 1, "seconds": 1.0, "tokens_per_s": 1.0},
            "curve": [{"step": 1}],
            "validation": {
                "perplexity": 1.0,
                "perplexity_per_word": 1.0,
                "bits_per_byte": 1.0,
                "tokens": 1,
                "usage": {},
            },
        }

    monkeypatch.setattr(module, "train", train)
    return calls
