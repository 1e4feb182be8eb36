"""Each private name of torch: what it is called for, with the torch that is installed; and what holds without it."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils.checkpoint import checkpoint

import memlayers
from memlayers import torch_private
from memlayers.ops.read import dot_reference
from memlayers.ops.row_gradient_tensor import RowTensor
from memlayers.optim import RowSGD
from memlayers.query import MaskedBatchNorm
from memlayers.values import ValueTable

SRC = Path(memlayers.__file__).parent


def table_step(table, optimizer):
    optimizer.zero_grad()
    table.read(torch.tensor([[0, 1]]), torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_the_package_calls_no_other_private_name():
    found = set()
    for file in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            found |= {
                (str(file.relative_to(SRC)), name)
                for name in names
                if name.startswith(("torch.", "nn."))
                and any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
            }
    elsewhere = {(file, name) for file, name in found if file != "torch_private.py"}
    assert {(file, name) for file, name in elsewhere if file != "lm/footprint.py"} == set()
    assert ("torch_private.py", "torch._C._current_graph_task_id") in found  # the walk sees them


def test_current_backward_tells_passes_apart():
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch_private.current_backward())
            return grad

    x = torch.ones(1, requires_grad=True)
    for _ in range(2):
        Watch.apply(x).backward()
    assert torch_private.current_backward() == -1
    assert seen[0] >= 0
    assert seen[1] >= 0
    assert seen[0] != seen[1]


def test_current_backward_is_there_in_a_recomputation():
    seen = []

    def block(x):
        seen.append(torch_private.current_backward())
        return x * x

    checkpoint(block, torch.ones(1, requires_grad=True), use_reentrant=False).backward()
    assert seen[0] == -1
    assert seen[1] >= 0


def test_training_stops_without_current_backward(monkeypatch):
    norm = MaskedBatchNorm(1, 2)
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.raises(RuntimeError, match="does not say which backward pass runs .*; use a version from 2.9 to 2.13"):
        norm(torch.randn(3, 1, 2))
    assert norm.eval()(torch.ones(3, 1, 2)).shape == (3, 1, 2)


def test_after_backward_calls_when_the_pass_is_over():
    order = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch_private.after_backward(lambda: order.append("over"))
            order.append("in it")
            return grad

    x = torch.ones(1, requires_grad=True)
    (2 * Watch.apply(2 * x)).backward()
    assert order == ["in it", "over"]


def test_without_after_backward_what_is_computed_on_the_side_is_no_gradient(monkeypatch):
    engine = torch.autograd.Variable._execution_engine
    without = SimpleNamespace(run_backward=engine.run_backward)
    monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", without)
    table = ValueTable(4, 2)
    optimizer = RowSGD(table, lr=1.0)
    weights = torch.ones(1, 2, requires_grad=True)
    torch.autograd.grad(table.read(torch.tensor([[2, 3]]), weights).sum(), weights)
    before = table.weight.detach().clone()
    table_step(table, optimizer)
    torch.testing.assert_close(before - table.weight.detach(), torch.tensor([[1.0, 1], [1, 1], [0, 0], [0, 0]]))


def changed_in_between(weight):
    loss = (weight * weight).sum()
    with torch_private.preserved_versions([weight]), torch.no_grad():
        weight.add_(1)
        weight.sub_(1)
    loss.backward()
    return weight.grad.tolist()


def test_preserved_versions_are_those_before():
    assert changed_in_between(torch.ones(2, requires_grad=True)) == [2, 2]


def test_without_preserved_versions_backward_says_so(monkeypatch):
    monkeypatch.delattr(torch.autograd, "_unsafe_preserve_version_counter")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed_in_between(torch.ones(2, requires_grad=True))


def test_hooks_after_accumulation_are_those_of_torch():
    heard = []
    weight = nn.Parameter(torch.ones(1))
    weight.register_post_accumulate_grad_hook(lambda _: heard.append("it"))
    hooks = torch_private.hooks_after_accumulation(weight)
    before = dict(hooks)
    hooks.clear()
    weight.sum().backward()
    assert heard == []
    hooks.update(before)
    weight.sum().backward()
    assert heard == ["it"]


def test_gradient_hooks_are_seen():
    weight = nn.Parameter(torch.ones(1))
    assert not torch_private.has_gradient_hooks(weight)
    handle = weight.register_hook(lambda grad: grad)
    assert torch_private.has_gradient_hooks(weight)
    handle.remove()
    assert not torch_private.has_gradient_hooks(weight)
    assert not torch_private.has_gradient_hooks(object())


class Opaque(torch_private.WrapperTensor):
    """Answers nothing."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def test_a_wrapper_has_the_shape_of_another_and_no_elements():
    wrapper = Opaque(torch.ones(2, 3, dtype=torch.float64))
    assert (wrapper.shape, wrapper.dtype, wrapper.device.type) == ((2, 3), torch.float64, "cpu")


def test_without_wrappers_no_row_gradient_is_made(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "_make_wrapper_subclass", None)
    with pytest.raises(RuntimeError, match="makes no tensors without elements"):
        Opaque(torch.ones(1))


def test_row_gradients_are_clipped_in_one_list_with_others(monkeypatch):
    from torch.utils import _foreach_utils

    assert RowTensor in _foreach_utils._foreach_supported_types
    monkeypatch.setattr(_foreach_utils, "_foreach_supported_types", [torch.Tensor])
    torch_private.take_in_lists(Opaque)
    assert _foreach_utils._foreach_supported_types == [torch.Tensor, Opaque]
    monkeypatch.delattr(_foreach_utils, "_foreach_supported_types")
    torch_private.take_in_lists(Opaque)


def test_ddp_reads_the_list_of_what_it_leaves_alone(monkeypatch, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(torch_private.left_alone_by_ddp(model)) == []
    torch_private.leave_alone_in_ddp(model, ["1.bias"])
    assert list(torch_private.left_alone_by_ddp(model)) == ["1.bias"]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        assert nn.parallel.DistributedDataParallel(model).parameters_to_ignore == {"1.bias"}
    finally:
        torch.distributed.destroy_process_group()


class Asked:
    @property
    def flag(self):
        return torch_private.is_asked_by_grad_scaler()


def test_only_a_grad_scaler_asks(monkeypatch):
    assert Asked().flag is False
    scaler_s = {"__name__": "torch.amp.grad_scaler", "asked": Asked()}
    exec("def ask(): return asked.flag", scaler_s)
    assert scaler_s["ask"]() is True
    monkeypatch.delattr(sys, "_getframe")
    assert Asked().flag is True


def test_hooks_after_accumulation_are_none_without_the_name():
    assert torch_private.hooks_after_accumulation(nn.Parameter(torch.ones(1))) == {}
    assert torch_private.hooks_after_accumulation(object()) == {}


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_forward_hooks_are_seen(register):
    module = nn.Identity()
    assert torch_private.has_forward_hooks(module) is False
    handle = getattr(module, register)(lambda *_: None)
    assert torch_private.has_forward_hooks(module) is True
    handle.remove()
    assert torch_private.has_forward_hooks(module) is False


@pytest.mark.parametrize("name", ["_forward_hooks", "_forward_pre_hooks"])
def test_without_the_name_a_module_has_forward_hooks(name):
    module = nn.Identity()
    del module.__dict__[name]
    assert torch_private.has_forward_hooks(module) is True


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_forward_hooks_are_seen(register):
    assert torch_private.has_global_forward_hooks() is False
    handle = getattr(nn.modules.module, register)(lambda *_: None)
    seen = torch_private.has_global_forward_hooks()
    handle.remove()
    assert seen is True
    assert torch_private.has_global_forward_hooks() is False


@pytest.mark.parametrize("name", ["_global_forward_hooks", "_global_forward_pre_hooks"])
def test_without_the_name_there_are_global_forward_hooks(monkeypatch, name):
    monkeypatch.delattr(nn.modules.module, name)
    assert torch_private.has_global_forward_hooks() is True


def test_the_base_of_batch_norms_is_that_by_which_they_are_found(monkeypatch):
    assert issubclass(nn.BatchNorm1d, torch_private.batch_norm_base())
    assert not issubclass(nn.LayerNorm, torch_private.batch_norm_base())
    monkeypatch.delattr(nn.modules.batchnorm, "_BatchNorm")
    assert torch_private.batch_norm_base() is nn.Module


def test_transforms_are_active_inside_of_them(monkeypatch):
    seen = []

    def function(x):
        seen.append(torch_private.transforms_are_active())
        return x.sum()

    x = torch.ones(2)
    for transform in (torch.func.grad(function), torch.func.vmap(function), function):
        transform(x)
    torch.func.jvp(function, (x,), (x,))
    assert seen == [True, True, False, True]
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert torch_private.transforms_are_active()


def test_a_dual_level_is_seen(monkeypatch):
    assert not torch_private.is_in_dual_level()
    with forward_ad.dual_level():
        assert torch_private.is_in_dual_level()
    monkeypatch.delattr(forward_ad, "_current_level")
    assert torch_private.is_in_dual_level()


@pytest.mark.parametrize("is_there", [True, False])
def test_is_wrapper_subclass(monkeypatch, is_there):
    from torch.testing._internal.two_tensor import TwoTensor

    if not is_there:
        monkeypatch.delattr(_python_dispatch, "is_traceable_wrapper_subclass")
    assert torch_private.is_wrapper_subclass(TwoTensor(torch.ones(1), torch.ones(1)))
    assert not torch_private.is_wrapper_subclass(torch.ones(1))
    assert not torch_private.is_wrapper_subclass(nn.Parameter(torch.ones(1)))


def stance(monkeypatch):
    """What `torch.compiler.set_stance` is asked."""
    asked = []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: asked.append(stance))
    torch_private.without_compiled_graphs()
    return asked


def test_where_nothing_is_compiled_nothing_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert stance(monkeypatch) == []
    assert "torch._dynamo" not in sys.modules


def test_where_something_may_be_compiled_it_runs_as_written(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", object())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert stance(monkeypatch) == ["force_eager"]


def test_without_the_name_of_the_compiler_it_is_always_asked(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert stance(monkeypatch) == ["force_eager"]


@pytest.mark.parametrize(("is_supported", "is_granted"), [(True, True), (True, False), (False, True)])
def test_matrix_units_must_be_there_and_granted(is_supported, is_granted, monkeypatch):
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    assert torch_private.starts_matrix_units() is torch.cpu._is_amx_tile_supported()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: is_supported)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: is_granted)
    assert torch_private.starts_matrix_units() is (is_supported and is_granted)


@pytest.mark.parametrize("name", ["_is_amx_tile_supported", "_init_amx"])
def test_without_the_names_there_are_no_matrix_units(name, monkeypatch):
    monkeypatch.delattr(torch.cpu, name)
    assert torch_private.starts_matrix_units() is False


def test_dot_in_bags_and_the_product_without_it_agree(monkeypatch):
    table, outputs = torch.randn(7, 5), torch.randn(3, 5)
    slots = torch.randint(7, (3, 2))
    assert torch_private.dot_in_bags() is not None
    with_kernel = dot_reference(table, slots, outputs)
    monkeypatch.setattr(torch.ops, "aten", object())
    assert torch_private.dot_in_bags() is None
    torch.testing.assert_close(with_kernel, torch.einsum("tkv,tv->tk", table[slots], outputs))
    torch.testing.assert_close(dot_reference(table, slots, outputs), with_kernel)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings the runtime of OpenMP under Linux only")
def test_openmp_parallel_is_found():
    assert torch_private.openmp_parallel() is not None


def test_without_the_library_there_is_no_openmp(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert torch_private.openmp_parallel() is None


@pytest.mark.parametrize("has_name", [True, False], ids=["", "without"])
def test_an_export_is_told_from_a_compilation(has_name, monkeypatch):
    if not has_name:
        monkeypatch.delattr(torch.compiler, "_is_exporting_flag")
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert torch_private.is_exporting()
        return

    class Asks(nn.Module):
        def forward(self, x):
            return x + 1 if torch_private.is_exporting() else x - 1

    x = torch.zeros(1)
    assert Asks()(x).item() == torch.compile(Asks(), backend="eager", fullgraph=True)(x).item() == -1
    for strict in (False, True):
        assert torch.export.export(Asks(), (x,), strict=strict).module()(x).item() == 1
