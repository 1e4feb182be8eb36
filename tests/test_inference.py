"""Captured decoding: with real CUDA graphs where there is a GPU, and anywhere with a stand-in for them."""

import contextlib
import copy
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memlayers import MemoryConfig, MemoryLayer, ValueTable, inference
from memlayers.inference import captured_decoding
from memlayers.layer import capturing, try_infer

CONFIG = MemoryConfig(dim=64, heads=3, topk=5, num_subkeys=12, query_dim=14)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Recorder(TorchDispatchMode):
    """What `torch.cuda.graph` is here: it lets operations run and notes them."""

    def __init__(self, graph, *, pool, stream, capture_error_mode):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        self.graph.calls[-1][-1].fill_(float("nan"))  # a capture computes nothing


class Graph:
    """What `torch.cuda.CUDAGraph` is here: a replay computes from the memory, and into the memory, of the capture."""

    made: list["Graph"]

    def __init__(self):
        self.calls, self.replays = [], 0
        Graph.made.append(self)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            result.copy_(func(*args, **kwargs))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were captured, on a CPU that is taken for a GPU."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": Graph,
        "graph": Recorder,
        "Stream": lambda device: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: False,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(inference, "_CAPTURED_ON", ("cpu",))
    monkeypatch.setattr(inference.gpu, "kernels", lambda name: types.SimpleNamespace(takes=lambda *_: True))
    monkeypatch.setattr(Graph, "made", [], raising=False)
    return Graph.made


def decoder(layers=2):
    model = nn.Sequential(*(MemoryLayer(CONFIG) for _ in range(layers)))
    for layer in model:
        nn.init.normal_(layer.query.norm.weight)
    return model.eval()


def replays(graphs):
    return [graph.replays for graph in graphs]


def assert_same(model, x):
    """As without a capture, call by call."""
    result = model(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capturing, "of", {})
        torch.testing.assert_close(result, model(x), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_each_layer_is_captured_once_and_replayed(graphs, mode):
    model = decoder()
    with mode(), captured_decoding(model):
        for _ in range(3):
            assert_same(model, torch.randn(1, 64))
    assert replays(graphs) == [3, 3]


def test_what_was_returned_is_not_written_over(graphs):
    model = decoder(1)
    with torch.no_grad(), captured_decoding(model):
        first = model(torch.randn(1, 64))
        kept = first.clone()
        model(torch.randn(1, 64))
    assert torch.equal(first, kept)


def test_a_graph_made_in_inference_mode_serves_outside_of_it(graphs):
    model = decoder(1)
    with captured_decoding(model):
        with torch.inference_mode():
            assert_same(model, torch.randn(1, 64))
        with torch.no_grad():
            assert_same(model, torch.randn(1, 64))
        assert model(torch.randn(1, 64)).requires_grad  # with gradients, a layer calls its parts
    assert replays(graphs) == [2]


def test_as_many_tokens_as_asked_for_each_number_its_own_graph(graphs):
    model = decoder(1)
    with torch.no_grad(), captured_decoding(model, tokens=3):
        for tokens in (3, 1, 3, 4, 0):
            assert_same(model, torch.randn(tokens, 64))
        assert_same(model, torch.randn(3, 1, 64))
    assert replays(graphs) == [3, 1]


@pytest.mark.parametrize("tokens", [0, 17, 1.5, True, "8", None])
def test_a_number_of_tokens_that_cannot_be_is_refused(tokens):
    with (
        pytest.raises(ValueError, match=f"tokens must be an integer from 1 to 16, got {tokens!r}"),
        captured_decoding(decoder(1), tokens=tokens),
    ):
        pass


def test_weights_may_change_in_place_or_be_replaced(graphs):
    model, x = decoder(1), torch.randn(1, 64)
    layer = model[0]
    with torch.no_grad(), captured_decoding(model):
        before = model(x)
        layer.values.weight.mul_(2)
        torch.testing.assert_close(model(x), before * 2)
        assert replays(graphs) == [2]
        layer.values.weight = nn.Parameter(layer.values.weight * 2)
        torch.testing.assert_close(model(x), before * 4)
        layer.values = ValueTable(144, 64, dtype=torch.bfloat16)
        assert_same(model, x)
        layer.values.weight = nn.Parameter(layer.values.weight.detach().view(torch.float16))  # the same bits
        assert_same(model, x)
        layer.keys.topk = 2
        assert_same(model, x)
        layer.query.norm.eps = 0.5
        assert_same(model, x)
    assert replays(graphs) == [2, 1, 1, 1, 1, 1]


def test_layers_that_cannot_be_one_operation_are_called(graphs):
    model = decoder(1)
    with torch.no_grad(), captured_decoding(model):
        with model[0].values.register_forward_hook(lambda *_: None):
            assert_same(model, torch.randn(1, 64))
        model.train()
        model(torch.randn(2, 64))
    assert graphs == []


def test_inside_of_another_capture_it_steps_aside(graphs, monkeypatch):
    model = decoder(1)
    with torch.no_grad(), captured_decoding(model):
        model(torch.randn(1, 64))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert_same(model, torch.randn(1, 64))
    assert replays(graphs) == [1]


def test_compiled_it_steps_aside(graphs):
    model, x = decoder(1), torch.randn(1, 64)
    with torch.no_grad(), captured_decoding(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        assert graphs == []
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    assert replays(graphs) == [1]


def test_what_has_no_kernels_is_not_captured(graphs, monkeypatch):
    model = decoder(1)
    monkeypatch.setattr(inference.gpu, "kernels", lambda name: None)
    with torch.no_grad(), captured_decoding(model):
        assert_same(model, torch.randn(1, 64))
        assert_same(model, torch.randn(1, 64))
    assert graphs == []


def test_all_is_restored(graphs):
    model = decoder()
    before = [{**vars(layer)} for layer in model]
    with torch.no_grad(), pytest.raises(ValueError, match="x must have dim"), captured_decoding(model):
        model(model(torch.randn(1, 64))[:, :9])
    assert [vars(layer) == known for layer, known in zip(model, before, strict=True)] == [True, True]
    with captured_decoding(model, tokens=2):
        outer = capturing.of
        with captured_decoding(model[0]):
            assert capturing.of[model[0]] is not outer[model[0]]
            assert capturing.of[model[1]] is outer[model[1]]
        assert capturing.of is outer
    assert capturing.of == {}


def test_a_copy_has_no_graphs(graphs):
    model = decoder(1)
    with torch.no_grad(), captured_decoding(model):
        model(torch.randn(1, 64))
        twin = copy.deepcopy(model)
        twin(torch.randn(1, 64))
        assert twin[0] not in capturing.of
    assert replays(graphs) == [1]
    twin(torch.randn(2, 64)).sum().backward()


def test_on_a_cpu_it_does_nothing():
    model, x = decoder(), torch.randn(1, 64)
    with torch.no_grad():
        expected = model(x)
        with captured_decoding(model):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float16_inputs_are_for_a_gpu(dtype):
    layer = decoder(1)[0].to(dtype)
    with torch.no_grad():
        assert (try_infer(layer, torch.randn(2, 64).to(dtype)) is None) is (dtype == torch.float16)
        if not torch.cuda.is_available():
            return
        layer, x = layer.cuda(), torch.randn(2, 64, device="cuda").to(dtype)
        assert try_infer(layer, x) is not None
        assert try_infer(layer, x.float()) is None  # of another dtype than its weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operation_s_fake_is_as_it(dtype):
    """Traced with fake tensors of a GPU: shape and dtype as the kernels give them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        layer = MemoryLayer(CONFIG, device="cpu", dtype=dtype)
        norm, linear = layer.query.norm, layer.query.projections[0]
        stats = norm.running_mean, norm.running_var, norm.weight, norm.bias
        x = torch.randn(2, 64, dtype=dtype)
        y = inference.infer(x, linear.weight, linear.bias, *stats, norm.eps, layer.keys.weight, 5, layer.values.weight)
    assert (y.shape, y.dtype) == ((2, 64), torch.float32)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_real_graphs(dtype):
    model = decoder(3).to("cuda", dtype)
    with torch.inference_mode():
        with captured_decoding(model, tokens=2):
            for tokens in (1, 1, 2, 1, 3):
                assert_same(model, torch.randn(tokens, 64, device="cuda", dtype=dtype))
            model[1].values.weight.mul_(2)
            assert_same(model, torch.randn(1, 64, device="cuda", dtype=dtype))
            model[1].values = ValueTable(144, 64, device="cuda", dtype=dtype)
            assert_same(model, torch.randn(1, 64, device="cuda", dtype=dtype))
        assert capturing.of == {}


@needs_cuda
def test_a_capture_of_the_whole_model():
    model, x = decoder(2).cuda(), torch.randn(1, 64, device="cuda")
    with torch.no_grad(), captured_decoding(model):
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
        torch.testing.assert_close(y, expected)
