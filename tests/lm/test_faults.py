import dataclasses
import math
import re
import shutil

import pytest
import torch
from torch import nn

import memlayers.lm.train as module
from memlayers.lm.checkpoint import TrainingState
from memlayers.lm.faults import TrainingFault, bad_gradient, bad_output, bad_parameter, bad_state
from memlayers.lm.metrics import MetricsFile
from memlayers.lm.run import RunFolder
from memlayers.lm.train import Loop, train
from memlayers.optim import MemoryAdamW, RowAdam
from memlayers.values import ValueTable


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.values = ValueTable(5, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        slots = torch.zeros(len(x), 1, dtype=torch.int64)  # one row for all
        return self.last(self.first(x) + self.values.read(slots, torch.ones(len(x), 1)))


def test_the_first_bad_parameter_is_named_with_its_place(monkeypatch):
    import memlayers.lm.faults as faults

    monkeypatch.setattr(faults, "ELEMENTS_AT_ONCE", 6)  # two rows at once
    model = Small()
    assert bad_parameter(model) is None
    with torch.no_grad():
        model.last.bias[0] = math.inf
        model.values.weight[3:, 1] = math.nan
    assert bad_parameter(model) == "values.weight (2 of 5 rows, the first is 3)"
    with torch.no_grad():
        model.first.weight[2, 1] = math.nan
    assert bad_parameter(model) == "first.weight (1 of 6 elements)"


def test_statistics_are_parameters_of_a_model_and_no_cause_of_a_loss():
    norm = nn.BatchNorm1d(3)
    norm.running_mean[1] = math.nan
    assert bad_parameter(norm) == "running_mean (1 of 3 elements)"
    assert bad_parameter(norm, buffers=False) is None


def test_bad_gradients_states_and_outputs_are_named():
    model = Small()
    optimizer = MemoryAdamW(model)
    model(torch.ones(4, 2)).sum().backward()
    assert bad_gradient(model) is None
    model.first.weight.grad[0] = math.nan
    assert bad_gradient(model).startswith("the gradient of first.weight (2 of 6 elements)")
    model.values.row_gradient.scale(math.inf)
    assert bad_gradient(model) == "the gradient of rows of values.weight"
    optimizer.zero_grad()
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    assert bad_state(model, optimizer) is None
    optimizer.state[model.last.weight]["exp_avg_sq"][0, 1] = math.inf
    assert bad_state(model, optimizer).startswith("exp_avg_sq of last.weight")
    assert bad_output(model, lambda: model(torch.ones(1, 2))) is None
    model.first.weight.data.fill_(10)
    assert bad_output(model, lambda: model(torch.full((1, 2), 3e38))) == "the output of first (Linear)"


def spoil_step(monkeypatch, at, what):
    """Do `what(model, loss)` to the loss of the step that follows `at` steps."""
    original, calls = module.batch_loss, []

    def batch_loss(model, *args):
        loss = original(model, *args)
        calls.append(model)
        return what(model, loss) if len(calls) == at + 1 else loss

    monkeypatch.setattr(module, "batch_loss", batch_loss)


@pytest.fixture
def config(tiny_config):
    return dataclasses.replace(
        tiny_config,
        training=dataclasses.replace(
            tiny_config.training, tokens=64 * 10, save_every_tokens=64 * 2, keep_checkpoints=1
        ),
    )


def stop(config, folder, corpus):
    with pytest.raises(TrainingFault) as caught:
        train(config, folder, corpus=corpus, progress=False)
    return str(caught.value)


class NotFinite(torch.autograd.Function):
    """The loss as it is, with a gradient that is not a number."""

    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, grad):
        return grad * math.nan


def test_a_loss_that_is_not_a_number_stops_the_run_with_its_batch(config, tiny_corpus, tmp_path, monkeypatch):
    spoil_step(monkeypatch, 5, lambda model, loss: loss * math.nan)
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert message.startswith("stopped at step 6 of 10: the loss is nan. First not to be finite: the loss itself")
    assert re.search(r"Batch: windows \d+, \d+, \d+, \d+ of the training text", message)
    assert message.endswith("the last good checkpoint is of step 4")
    folder = RunFolder(tmp_path / "run")
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4, 5]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000004"]
    assert not folder.finished


def test_a_gradient_that_is_not_a_number_is_never_stepped_on(config, tiny_corpus, tmp_path, monkeypatch):
    trained = []

    def spoil(model, loss):
        trained.append(model)
        return NotFinite.apply(loss)

    spoil_step(monkeypatch, 3, spoil)
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert re.search(r"at step 4 of 10: the loss is \d\.\d+, but its gradient is not finite", message)
    assert "First not to be finite: the gradient of" in message
    assert bad_parameter(trained[0]) is None


def test_rows_whose_gradient_overflows_stop_the_run(config, tiny_corpus, tmp_path, monkeypatch):
    """Clipping sees the dense gradients alone, so the rows are looked at apart."""
    original = Loop.checked_norm

    def overflow(self, loss):
        if self.step == 3:
            (layer,) = module.memory_layers(self.model).values()
            layer.values.row_gradient.scale(math.inf)
        return original(self, loss)

    monkeypatch.setattr(Loop, "checked_norm", overflow)
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert "at step 4 of 10" in message
    assert "the gradient of rows of transformer.h.1.mlp.memory.values.weight" in message


def test_rows_that_went_bad_are_named_before_anything_else(config, tiny_corpus, tmp_path, monkeypatch):
    def spoil(model, loss):
        (layer,) = module.memory_layers(model).values()
        with torch.no_grad():
            layer.values.weight[7] = math.inf
        return loss * math.nan

    spoil_step(monkeypatch, 5, spoil)
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert "First not to be finite: transformer.h.1.mlp.memory.values.weight (1 of 16 rows, the first is 7)" in message


@pytest.mark.parametrize("when", ["checkpoint", "end"])
def test_rows_that_went_bad_and_were_not_read_again_are_not_saved(config, tiny_corpus, tmp_path, monkeypatch, when):
    step = 4 if when == "checkpoint" else 10
    original = Loop.finish_step

    def spoil(self, line):
        if self.step == step:
            (layer,) = module.memory_layers(self.model).values()
            layer.values.weight.data[7] = math.nan
        return original(self, line)

    monkeypatch.setattr(Loop, "finish_step", spoil)
    monkeypatch.setattr(module, "evaluate", lambda *args, **kwargs: finite_evaluation())
    message = stop(config, tmp_path / "run", tiny_corpus)
    kept = "step 2" if when == "checkpoint" else "step 8"
    assert message == (
        f"stopped at step {step} of 10: transformer.h.1.mlp.memory.values.weight (1 of 16 rows, the first is 7) is not "
        f"finite; the last good checkpoint is of {kept}"
    )
    assert not RunFolder(tmp_path / "run").model.exists()


def finite_evaluation():
    return module.Evaluation(tokens=1, words=1, bytes=1, nll=1.0)


def test_a_validation_loss_that_is_not_a_number_stops_the_run(config, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "evaluate", lambda *args, **kwargs: dataclasses.replace(finite_evaluation(), nll=math.nan)
    )
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert message.startswith("stopped at step 4 of 10: the loss of a validation text, by a model that is finite,")


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays(config, tiny_corpus, tmp_path, monkeypatch, writer):
    """torch and safetensors raise errors of their own for what the system says."""
    original = TrainingState.save

    def fill(self, folder, draws):
        original(self, folder, draws)
        if "step-00000004" in folder.name:
            raise OSError(28, "No space left on device") if writer == "torch" else RuntimeError("write failed")

    monkeypatch.setattr(TrainingState, "save", fill)
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert message.startswith("the checkpoint of step 4 could not be written to")
    assert message.endswith("GB are free there; the last good checkpoint is of step 2")
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000002"]
    monkeypatch.setattr(TrainingState, "save", original)
    train(config, folder.path, corpus=tiny_corpus, progress=False, resume=True)
    assert folder.finished


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(config, tiny_corpus, tmp_path, monkeypatch):
    import memlayers.lm.train as training

    with monkeypatch.context() as patch:
        patch.setattr("memlayers.lm.footprint.available_memory", lambda device: 1000)
        with pytest.raises(ValueError, match=r"needs about \d+ kB and 1 kB are available on cpu:\n +parameters"):
            train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match="output must have .* free for checkpoints and the model, .* has 100 B"):
        train(config, tmp_path / "run", corpus=tiny_corpus, progress=False)
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_says_what_is_needed(config, tiny_corpus, tmp_path, monkeypatch):
    def spoil(model, loss):
        torch.empty(1 << 60)

    spoil_step(monkeypatch, 3, spoil)
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert message.startswith("out of memory: a training step needs about")
    assert re.search(r"parameters +\d+ kB\n +gradients +\d+ kB\n +optimizer state +\d+ kB\n +activations", message)


@pytest.mark.parametrize("what", ["metrics of step 4", "model"])
def test_a_disk_that_is_full_elsewhere_is_said_too(config, tiny_corpus, tmp_path, monkeypatch, what):
    def fail(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    original = MetricsFile.append
    if what == "model":
        monkeypatch.setattr(RunFolder, "save_model", fail)
    else:
        monkeypatch.setattr(
            MetricsFile, "append", lambda self, line: (fail if line["step"] == 4 else original)(self, line)
        )
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert message.startswith(f"the {what} could not be written to {str(tmp_path / 'run')!r}: [Errno 28] No space left")
    kept = 2 if what != "model" else 8
    assert message.endswith(f"GB are free there; the last good checkpoint is of step {kept}")


def test_a_disk_that_is_full_at_the_first_checkpoint_is_said_too(config, tiny_corpus, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memlayers.lm.checkpoint.new_folder", fail)
    message = stop(config, tmp_path / "run", tiny_corpus)
    assert message.startswith("the checkpoint of step 2 could not be written to")
    assert message.endswith("there is no checkpoint yet")


@pytest.mark.parametrize("clipped", [True, False])
def test_gradients_are_looked_at_with_and_without_clipping(config, tiny_corpus, tmp_path, monkeypatch, clipped):
    spoil_step(monkeypatch, 3, lambda model, loss: NotFinite.apply(loss))
    training = dataclasses.replace(config.training, max_grad_norm=1.0 if clipped else 0.0)
    message = stop(dataclasses.replace(config, training=training), tmp_path / "run", tiny_corpus)
    assert "but its gradient is not finite" in message


def test_rows_whose_squares_overflow_are_not_finite():
    table = ValueTable(4, 2)
    optimizer = RowAdam([table], lr=0.1)
    slots, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    for factor, size, good in ((1.0, 1e18, True), (1.0, 1e20, False), (1e20, 1e20, False), (math.nan, 1.0, False)):
        table.row_gradient.add(slots, weights * factor, torch.full((1, 2), size))
        assert bool(table.row_gradient.is_finite()) is good
        optimizer.zero_grad()
    assert bool(table.row_gradient.is_finite())
