"""Gradients that are missing or spoilt, and what is frozen."""

from memlayers import doctor
from memlayers.optim import MemoryAdamW


def test_frozen_table(block, batch, fails, only):
    block.mlp.values.weight.requires_grad_(False)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    fails(report, "frozen", "the table is frozen")
    only(report, "frozen")


def test_frozen_gate_at_zero(make_block, batch, found, fails):
    block = make_block(parallel=True)
    block.mlp.gate.requires_grad_(False)
    fails(doctor(block, batch, optimizer=MemoryAdamW(block)), "frozen", "the gate is zero and frozen")
    block.mlp.gate.fill_(0.5)
    assert found(doctor(block, batch), "frozen").state == "warn"


def test_frozen_queries_are_a_warning(block, batch, found):
    block.mlp.query.requires_grad_(False)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    assert report.ok
    assert found(report, "frozen").state == "warn"
    assert "query.projections.0.weight" in found(report, "frozen").message


def test_gradients_that_are_not_there(block, batch, fails):
    block.mlp.keys.register_forward_hook(lambda module, args, hits: hits._replace(scores=hits.scores.detach()))
    finding = fails(doctor(block, batch), "gradients", "missing")
    assert "keys.weight" in finding.message
    assert "values.weight" not in finding.message


def test_gradients_that_are_not_finite(block, batch, fails):
    block.mlp.values.register_full_backward_hook(lambda module, into, out: (into[0], into[1] * float("inf")))
    assert "not finite" in fails(doctor(block, batch), "gradients", "keys.weight").message


def test_one_neighbour_trains_no_query(make_block, batch, found):
    finding = found(doctor(make_block(topk=1), batch), "gradients")
    assert finding.state == "warn"
    assert "keys.weight" in finding.message


def test_a_penalty_on_a_table_in_row_mode(block, batch, fails):
    def loss(model, batch):
        return model(batch).sum() + 1e-2 * model.mlp.values.weight.square().sum()

    fails(doctor(block, batch, optimizer=MemoryAdamW(block), loss=loss), "gradients", "values.weight has a dense grad")
