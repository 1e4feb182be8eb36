"""What `Monitor` collects while a model trains, and when it says so: of one memory, without a `Trainer`."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlayers.diagnosis.alarms import Monitor
from memlayers.diagnosis.subjects import find_subjects


def monitor_of(model, window=64):
    (subject,) = find_subjects(model)
    return Monitor(subject, window=window)


class WithMore(nn.Module):
    """Returns a tuple, as the experts of some models do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x), None


@pytest.mark.parametrize("make_base", [lambda: nn.Linear(16, 16), WithMore], ids=["a tensor", "a tuple"])
def test_the_output_is_compared_with_the_input_and_the_network_beside(make_block, batch, make_base):
    block = make_block(parallel=True)
    block.mlp.base = base = make_base()
    with torch.no_grad():
        block.memory.values.weight.mul_(1e6)
    mlp, first_of = block.mlp.train(), lambda output: output[0] if isinstance(output, tuple) else output
    with monitor_of(block) as monitor:
        mlp.eval()(100 * batch)  # not in training
        mlp.train()
        x = batch.clone().requires_grad_()
        first_of(checkpoint(mlp, x, use_reentrant=False)).sum().backward()  # the recomputation counts no second time
        check, said = monitor.output()
        assert monitor.output() is None  # since the last look
        mlp(batch)
        assert monitor.output() == (check, said)
    with torch.no_grad():
        own, beside = block.memory(batch).norm(), first_of(base(batch)).norm()
    assert check == "output"
    assert said == (
        f"the norm of its output is far off: {own / batch.norm():.3g} times that of its input and "
        f"{own / beside:.3g} times that of the network beside it"
    )


def test_padding_does_not_count(block, batch):
    mask = torch.arange(16).expand(8, 16) < 12
    padded = torch.where(mask[..., None], batch, torch.inf)
    with torch.no_grad():
        block.mlp.values.weight.mul_(1e6)
    with monitor_of(block, window=128) as monitor:
        y = block.mlp.train()(padded, mask=mask)
        _, said = monitor.output()
        slots_WHK = monitor._slots_WHK.unflatten(0, (8, 16))
    assert f"{y[mask].norm() / batch[mask].norm():.3g} times that of its input" in said
    assert (slots_WHK[~mask] == -1).all()
    assert (slots_WHK[mask] >= 0).all()


def test_the_window_holds_the_last_tokens_in_turn(block, batch):
    found = []
    block.mlp.keys.register_forward_hook(lambda keys, args, hits: found.append(hits.slots.flatten(0, -3)))
    with monitor_of(block, window=20) as monitor:
        block.train()
        block.mlp(batch[0])  # 16 tokens, of which the next ones replace the first 12
        checkpoint(block.mlp, batch[1].clone().requires_grad_(), use_reentrant=False).sum().backward()
        block.eval()
        block.mlp(batch[2])  # not in training
    held = torch.cat([found[1][4:], found[0][12:], found[1][:4]])
    assert torch.equal(monitor._slots_WHK.long(), held)


def test_a_step_without_the_memory_is_counted_until_the_next_look(block, batch):
    with monitor_of(block) as monitor:
        block.train()
        block(batch)
        monitor.end_step()
        assert monitor.reached() is None
        monitor.end_step()
        assert monitor.reached() == ("reached", "the model did not call it in 1 step: it was bypassed")
        for _ in range(2):
            monitor.end_step()
        assert monitor.reached() == ("reached", "the model did not call it in 2 steps: it was bypassed")
        assert monitor.reached() is None


def test_rows_that_were_read_and_stay_as_they_are_are_counted(block, batch):
    weight, optimizer = block.mlp.values.weight, torch.optim.SGD(block.parameters(), lr=0.1)
    with monitor_of(block, window=128) as monitor:
        assert monitor.written() is None  # nothing was noted
        block.train()(batch)
        read = len(monitor._slots_WHK.unique())
        assert 10 < read < 64
        monitor.note_rows(optimizer)
        said = f"a step of the optimizer wrote none of {read} rows that were read"
        assert monitor.written(optimizer) == ("written", said)
        assert monitor.written(optimizer) is None  # of that step, once
        monitor.note_rows(optimizer)
        with torch.no_grad():
            weight[monitor._slots_WHK[0, 0, 0].long()] += 1  # one is enough
        assert monitor.written(optimizer) is None
        weight.requires_grad_(False)
        monitor.note_rows(optimizer)
        assert monitor.written(optimizer) == ("written", f"{said}: its table is frozen")
        optimizer.step_was_skipped = True
        monitor.note_rows(optimizer)
        assert monitor.written(optimizer) is None


@pytest.mark.parametrize(("rate", "is_looked_at"), [(0.0, False), (0.1, True)])
def test_a_step_at_a_rate_of_zero_need_not_write(block, batch, rate, is_looked_at):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate / 0.1)
    with monitor_of(block) as monitor:
        block.train()(batch)
        monitor.note_rows(optimizer)
        assert (monitor.written(optimizer) is not None) is is_looked_at


def test_a_closed_gate_is_said_at_the_second_look_that_finds_it_so(make_block):
    block = make_block(parallel=True)
    monitor = monitor_of(block)
    assert monitor.gate() is None
    with torch.no_grad():
        block.mlp.gate[0] = 1
    assert monitor.gate() is None
    with torch.no_grad():
        block.mlp.gate.zero_()
    assert [monitor.gate() is not None for _ in range(4)] == [False, True, False, False]
