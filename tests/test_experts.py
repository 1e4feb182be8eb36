import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from memlayers import Experts, MemoryConfig, MemoryLayer, RowAdam, UsageMeter, ValueTable, doctor
from memlayers.experts import ExpertTable, InputTable
from memlayers.models import add_memory, causal_lm, memory_layers, memory_summary
from memlayers.optim import MemoryAdamW, RowSGD
from memlayers.parameters import count_parameters

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
TABLES = ("values.weight", "values.inputs.weight")


def config(**fields):
    return MemoryConfig(
        **{"dim": 13, "value_dim": 7, "heads": 3, "topk": 4, "num_subkeys": 5, "query_dim": 6, "query_norm": "none"}
        | fields
    )


def reference(layer, x_TD, parameters):
    """m(x) from the definition, in plain PyTorch: all S keys scored, the rows of u and v gathered."""
    c = layer.config
    query_TF = F.linear(x_TD, parameters["query.projections.0.weight"], parameters["query.projections.0.bias"])
    query_THQ = query_TF.view(-1, c.heads, c.query_dim)
    if c.query_norm == "batch":
        centred = query_THQ - query_THQ.mean(0)
        query_THQ = centred / (centred.square().mean(0) + 1e-5).sqrt()
        query_THQ = query_THQ * parameters["query.norm.weight"] + parameters["query.norm.bias"]
    first_HNC, second_HNC = parameters["keys.weight"]
    half = c.query_dim // 2
    first_THN = torch.einsum("thc,hnc->thn", query_THQ[..., :half], first_HNC)
    second_THN = torch.einsum("thc,hnc->thn", query_THQ[..., half:], second_HNC)
    scores_THK, slots_THK = (first_THN[..., :, None] + second_THN[..., None, :]).flatten(-2).topk(c.topk)
    u_THKD, v_THKV = parameters["values.inputs.weight"][slots_THK], parameters["values.weight"][slots_THK]
    z_THK = torch.einsum("thkd,td->thk", u_THKD, x_TD)
    neurons_THK = z_THK * 0.5 * (1 + torch.erf(z_THK / 2**0.5))  # GELU
    y_TV = torch.einsum("thk,thk,thkv->tv", scores_THK.softmax(-1), neurons_THK, v_THKV)
    return F.linear(y_TV, parameters["output.weight"]) if "output.weight" in parameters else y_TV


def gradients(layer, loss):
    """All gradients of a backward pass, those of tables in row mode summed."""
    loss.backward()
    found = {}
    for name, parameter in layer.named_parameters():
        if name.endswith("row_mark"):
            continue
        table = layer.get_submodule(name.rpartition(".")[0]) if name in TABLES else None
        if table is None or table.row_gradient is None:
            found[name] = parameter.grad
        else:
            assert parameter.grad is None
            rows = table.row_gradient.summed()
            found[name] = torch.zeros_like(parameter).to(rows.grad_PV.dtype)
            found[name][slice(None) if rows.rows_P is None else rows.rows_P] = rows.grad_PV
    return found


OPTIONS = {
    "odd sizes": {},
    "batch norm": {"query_norm": "batch"},
    "as wide as the model": {"value_dim": None},
    "one head": {"heads": 1},
    "many sub-keys": {"num_subkeys": 37, "query_dim": 4},
}


@pytest.mark.parametrize("mode", ["dense", "row"])
@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_equation_and_so_is_every_gradient(fields, mode):
    layer = Experts(config(**fields), dtype=torch.float64)
    owner = RowSGD(layer, lr=1.0) if mode == "row" else None
    x = torch.randn(4, 5, 13, dtype=torch.float64, requires_grad=True)
    x_ref = x.detach().clone().requires_grad_()
    leaves = {name: one.detach().clone().requires_grad_() for name, one in layer.named_parameters()}
    y, expected = layer(x), reference(layer, x_ref.flatten(0, 1), leaves).view(4, 5, 13)
    torch.testing.assert_close(y, expected)
    ours = gradients(layer, (y * y.detach().cos()).sum())
    (expected * expected.detach().cos()).sum().backward()
    torch.testing.assert_close(x.grad, x_ref.grad)
    for name, grad in ours.items():
        assert grad.any() or name == "query.projections.0.bias", name  # before a BatchNorm
        torch.testing.assert_close(grad, leaves[name].grad, msg=name)
    assert {*TABLES} < ours.keys()
    if owner is not None:
        before = leaves["values.inputs.weight"].detach().clone()
        owner.step()
        torch.testing.assert_close(layer.values.inputs.weight, before - leaves["values.inputs.weight"].grad)


def test_gradcheck():
    layer = Experts(
        MemoryConfig(dim=3, value_dim=2, heads=2, topk=2, num_subkeys=3, query_dim=4, query_norm="rms"),
        dtype=torch.float64,
    )
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


def test_u_never_gets_a_dense_gradient_and_only_rows_that_were_found_move():
    layer = Experts(config(num_subkeys=20))
    optimizer = MemoryAdamW(layer, lr=1e-3, value_lr=0.1)
    before = {name: layer.get_parameter(name).detach().clone() for name in TABLES}
    x = torch.randn(6, 13)
    found = layer.keys(layer.query(x)).slots.unique()
    layer(x).square().sum().backward()
    assert len(found) < 100
    for name in TABLES:
        assert layer.get_parameter(name).grad is None
    optimizer.step()
    for name in TABLES:
        moved = (layer.get_parameter(name) != before[name]).any(1).nonzero().squeeze(1)
        assert moved.tolist() == found.tolist()
        state = optimizer.state[layer.get_parameter(name)]
        assert state["steps"].nonzero().squeeze(1).tolist() == found.tolist()


@pytest.mark.parametrize("parts", [1, 3])
def test_rows_and_dense_adam_train_alike_also_by_accumulation(parts):
    """Every row is read at every step, where lazy moments are those of Adam."""
    layer = Experts(config(num_subkeys=3, topk=3, heads=4))
    twin = copy.deepcopy(layer)
    rows = MemoryAdamW(layer, lr=0.01, value_lr=0.05)
    dense = torch.optim.AdamW(
        [
            {"params": [twin.get_parameter(name) for name in TABLES], "lr": 0.05},
            {"params": [one for name, one in twin.named_parameters() if not name.startswith("values.")], "lr": 0.01},
        ],
        weight_decay=0,
    )
    x = torch.randn(3, 60, 13)
    for _ in range(3):
        for model, step in ((layer, rows), (twin, dense)):
            for part in x.chunk(parts):
                (model(part).square().sum() / 180).backward()
            step.step()
            step.zero_grad()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-3, atol=1e-4, msg=name)


def test_layers_share_experts():
    first = Experts(config())
    second = Experts(config(heads=2, topk=3), values=first.values)
    assert second.values.inputs is first.values.inputs
    twins = copy.deepcopy(nn.ModuleList([first, second]))
    optimizer = RowAdam(nn.ModuleList([first, second]), lr=0.1)
    assert len(optimizer.tables) == 2
    dense = torch.optim.Adam([twins[0].get_parameter(name) for name in TABLES], lr=0.1)
    x = torch.randn(50, 13)
    for layers, step in (((first, second), optimizer), (twins, dense)):
        sum(layer(x) for layer in layers).square().sum().backward()
        step.step()
    for name in TABLES:
        torch.testing.assert_close(first.get_parameter(name), twins[0].get_parameter(name), rtol=1e-4, atol=1e-5)
    kept = {name: first.get_parameter(name).detach().clone() for name in TABLES}
    second.reset_parameters()
    assert all(torch.equal(first.get_parameter(name), kept[name]) for name in TABLES)
    first.reset_parameters()
    assert not any(torch.equal(first.get_parameter(name), kept[name]) for name in TABLES)
    counts = count_parameters(nn.ModuleList([first, second]))
    assert counts["values"] == 25 * (7 + 13)


@pytest.mark.parametrize(
    ("table", "got"),
    [(lambda: ValueTable(25, 7), "none"), (lambda: ExpertTable(25, 7, 12), "25 x 12")],
    ids=["of values", "of another width"],
)
def test_a_table_without_such_inputs_is_refused(table, got):
    with pytest.raises(ValueError, match=f"table of Experts, whose inputs are 25 x 13, got {got}$"):
        Experts(config(), values=table())
    with pytest.raises(ValueError, match="values must be a table of 25 slots of width 7, got 25 x 6"):
        Experts(config(), values=ExpertTable(25, 6, 13))


@pytest.mark.parametrize("query_norm", ["batch", "rms"])
@pytest.mark.parametrize("mode", ["dense", "row"])
def test_padding_says_nothing_and_trains_nothing(query_norm, mode):
    kept = torch.randn(2, 5, 13)
    results = []
    for fill in (0.0, 100.0, torch.nan):
        torch.manual_seed(1)
        layer = Experts(config(query_norm=query_norm, num_subkeys=20))
        owner = RowAdam(layer) if mode == "row" else None
        x = torch.where(MASK[..., None] == 1, kept, fill).requires_grad_()
        y = layer(x, MASK)
        assert not y[MASK == 0].any()
        found = gradients(layer, y.square().sum())
        assert not x.grad[MASK == 0].any()
        if owner is not None:  # an entry of padding has a weight of zero: no step of its row
            (part,) = layer.values.inputs.row_gradient._parts
            assert not part.weights_TK[MASK.flatten() == 0].any()
        results.append([y, x.grad, *found.values(), *layer.buffers()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_evaluation_is_the_same_with_and_without_gradients_and_token_by_token():
    layer = Experts(config(query_norm="batch"))
    layer(torch.randn(40, 13))
    layer.eval()
    x = torch.randn(6, 13)
    y = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
        torch.testing.assert_close(torch.cat([layer(token[None]) for token in x]), y)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_records_once(reentrant):
    layer, x = Experts(config(query_norm="rms")), torch.randn(9, 13)
    twin = copy.deepcopy(layer)
    owners = [RowAdam(layer), RowAdam(twin)]
    plain = gradients(layer, layer(x.clone().requires_grad_()).square().sum())
    again = gradients(twin, checkpoint(twin, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum())
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)
    assert len(owners[1].tables[1].row_gradient._parts) == 1


@pytest.mark.parametrize("mode", ["dense", "row"])
def test_compiled_in_one_graph_it_gives_the_same_outputs_and_gradients(mode):
    layer = Experts(config(query_norm="batch"))
    twin = copy.deepcopy(layer)
    owners = [RowAdam(model) for model in (layer, twin)] if mode == "row" else []
    x = torch.randn(2, 5, 13)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    results = []
    for model, function in ((layer, layer), (twin, compiled)):
        for _ in range(2):  # the second pass has another handle
            y = function(x, MASK)
            found = gradients(model, y.square().sum())
        results.append((y, found))
    assert {*TABLES} < results[0][1].keys()
    assert all((owner.tables[1].weight.grad is None) for owner in owners)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", ["dense", "row"])
def test_autocast_and_16_bit_layers_train(mode):
    layer = Experts(config())
    owner = RowAdam(layer) if mode == "row" else None
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(6, 13).bfloat16())
    found = gradients(layer, y.sum())
    for name, grad in found.items():
        assert grad.dtype == torch.float32, name
        assert grad.isfinite().all(), name
    narrow = Experts(config(), dtype=torch.bfloat16)
    narrow.load_state_dict(layer.state_dict())
    optimizer = MemoryAdamW(narrow, lr=0.01, value_lr=0.1) if owner is not None else None
    x = torch.randn(20, 13).bfloat16()
    y, expected = narrow(x), layer(x.float())
    assert y.dtype == torch.bfloat16
    near = (y.float() - expected).abs().amax(-1) < 0.05 * expected.abs().max()
    assert near.float().mean() > 0.7  # rounded scores swap near-ties
    before = narrow.values.inputs.weight.detach().clone()
    found = gradients(narrow, y.float().square().sum())
    assert all(grad.isfinite().all() for grad in found.values())
    if optimizer is not None:
        optimizer.step()
        assert not torch.equal(narrow.values.inputs.weight, before)


def test_a_state_of_the_optimizer_and_a_copy_hold_both_tables(tmp_path):
    layer = Experts(config()).eval()
    optimizer = MemoryAdamW(layer)
    x = torch.randn(8, 13)
    layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.values.inputs.row_gradient is None
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(layer)
    other = MemoryAdamW(twin)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for model, step in ((layer, optimizer), (twin, other)):
        model(x).sum().backward()
        step.step()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


def test_doctor_passes_and_usage_is_measured():
    layer, x = Experts(config(query_norm="batch", num_subkeys=8)), torch.randn(200, 13)
    optimizer = MemoryAdamW(layer)
    before = {name: one.detach().clone() for name, one in layer.state_dict().items()}
    report = doctor(layer, x, optimizer=optimizer)
    assert report.ok, report
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad(), UsageMeter(layer.eval()) as meter:
        layer(x)
    assert (meter.report().tokens, meter.report().slots) == (200, 64)


def test_doctor_names_a_table_that_nobody_trains_or_that_is_decayed():
    layer, x = Experts(config(num_subkeys=8)), torch.randn(200, 13)
    rows = RowAdam([layer.values])
    rest = [one for name, one in layer.named_parameters() if not name.startswith("values.")]
    inputs = layer.values.inputs.weight
    for rate, message in ((0.0, "no row of values.inputs.weight is written"), (0.1, None)):
        dense = torch.optim.AdamW([{"params": rest}, {"params": [inputs], "lr": rate}], lr=1e-3, weight_decay=0.5)
        found = {finding.check: finding for finding in doctor(layer, x, optimizer=[rows, dense]).findings}
        assert found["written"].state == ("fail" if message else "pass")
        assert message is None or message in found["written"].message
        assert found["decay"].state == "fail"


def test_an_activation_of_another_kind_is_a_method():
    class Squared(Experts):
        def activate(self, products_TM):
            return products_TM.square()

    layer = Squared(config(heads=1, topk=1)).eval()
    x = torch.randn(1, 13)
    (slot,) = layer.keys(layer.query(x)).slots.flatten().tolist()
    said = (layer.values.inputs.weight[slot] @ x[0]).square() * layer.values.weight[slot]
    torch.testing.assert_close(layer(x)[0], layer.output(said))


def test_inputs_of_one_token_need_no_leading_shape():
    inputs, slots, x = InputTable(9, 4), torch.tensor([2, 8, 2]), torch.randn(4)
    torch.testing.assert_close(inputs(slots, x), inputs.weight[slots] @ x)


def test_inputs_are_called_with_slots_and_inputs_of_one_leading_shape():
    table = InputTable(5, 3)
    slots = torch.tensor([[[0, 4], [1, 1], [2, 3]]])
    inputs = torch.randn(1, 3, 3)
    torch.testing.assert_close(table(slots, inputs), (table.weight[slots] * inputs[..., None, :]).sum(-1))
    with pytest.raises(ValueError, match=r"one leading shape, got \[1, 3\] and \[3\]"):
        table(slots, inputs[0])


def test_meta_device_then_materialised():
    layer = Experts(config(), device="meta")
    assert layer(torch.randn(3, 13, device="meta")).is_meta
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan)
    layer.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    assert layer.values.inputs.weight.std().item() == pytest.approx(13**-0.5, rel=0.2)
    assert isinstance(layer, MemoryLayer)


@pytest.mark.promise(
    "Heads and classes",
    "experts of one neuron (PEER) in a model",
    "supported",
    "`add_memory(kind=Experts)`; both of their tables are trained by rows",
)
@pytest.mark.parametrize("share_values", [False, True])
def test_experts_in_a_model_are_trained_saved_and_loaded(share_values, tmp_path):
    memory = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)
    model = causal_lm("gpt2", vocab_size=40, layers=2, dim=16, heads=2, context=16)
    add_memory(model, memory, [1, 2], kind=Experts, share_values=share_values)
    optimizer = MemoryAdamW(model)
    ids = torch.randint(0, 40, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    first, second = memory_layers(loaded := AutoModelForCausalLM.from_pretrained(tmp_path)).values()
    assert type(first) is Experts
    assert (first.values.inputs is second.values.inputs) is share_values
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    tables = 36 * 16 * 2 * (1 if share_values else 2)
    assert memory_summary(model, optimizer).parts["values"].parameters == tables
    assert memory_summary(model, optimizer).row_tables == (2 if share_values else 4)
