"""Memories in modules that are no model of transformers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlayers import MemoryConfig, MemoryPlus, UsageMeter
from memlayers.models import add_memory, freeze_base, memory_layers, remove_memory
from memlayers.models.calls import in_progress
from memlayers.models.wrappers import find_wrappers
from memlayers.optim import MemoryAdamW

MEMORY = MemoryConfig(dim=16, heads=2, topk=3, num_subkeys=6, query_dim=8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Images [B, 3, 8, 8] to 4 classes, by patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """torch's own encoder, called with a padding mask of its own kind."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Masked(nn.Module):
    """A model that is given a mask as models of transformers are."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.block = Block()

    def forward(self, input_ids, attention_mask=None):
        return self.block(self.embedding(input_ids))


# Their modules to name, and an input.
MODELS = {
    "vision": (VisionTransformer, r"blocks\.(0|2)\.mlp", (5, 3, 8, 8)),
    "encoder": (Encoder, ["encoder.layers.1"], (5, 6, 16)),
    "sequential": (lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), "0", (5, 16)),
}


@pytest.fixture(params=MODELS)
def case(request):
    build, layers, shape = MODELS[request.param]
    return build().eval(), layers, torch.randn(shape)


def output(model, x):
    with torch.no_grad():
        return model.eval()(x)


def test_beside_a_module_and_away_again(case):
    model, layers, x = case
    model_class, names = type(model), [name for name, _ in model.named_modules()]
    expected = output(model, x)
    assert add_memory(model, MEMORY, layers, mode="parallel") is model
    assert type(model) is model_class
    assert torch.equal(output(model, x), expected)

    optimizer = MemoryAdamW(freeze_base(model), lr=0.05, value_lr=0.05)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model.train()(x), torch.arange(5) % 4)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained = output(model, x)
    assert not torch.allclose(trained, expected, atol=1e-3)

    twin = copy.deepcopy(model)
    loaded = add_memory(copy.deepcopy(remove_memory(model)), MEMORY, layers, mode="parallel")
    loaded.load_state_dict(twin.state_dict())
    assert torch.equal(output(loaded, x), trained)
    assert torch.equal(output(model, x), expected)
    assert [name for name, _ in model.named_modules()] == names


def test_in_place_of_a_module_that_is_kept(case):
    model, layers, x = case
    expected = output(model, x)
    add_memory(model, MEMORY, layers, keep_original=True)
    assert not torch.allclose(output(model, x), expected, atol=1e-3)
    F.cross_entropy(model.train()(x), torch.arange(5) % 4).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert torch.equal(output(remove_memory(model), x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(case, copied):
    model, layers, x = case
    add_memory(model, MEMORY, layers, mode="parallel", share_values=True)
    for _, wrapper in find_wrappers(model):
        wrapper.gate.data.fill_(2.0)
    twin = copied(model)
    assert torch.equal(output(twin, x), output(model, x))
    assert len({memory.values for memory in memory_layers(twin).values()}) == 1
    assert not set(twin.parameters()) & set(model.parameters())


def test_a_subclass_of_the_layer():
    model = VisionTransformer()
    add_memory(model, MEMORY, r"blocks\.1\.mlp", kind=MemoryPlus)
    assert [type(memory) for memory in memory_layers(model).values()] == [MemoryPlus]


@pytest.mark.parametrize("kind", [nn.Linear, "MemoryPlus", MEMORY])
def test_what_is_no_kind_of_memory_is_refused(kind):
    with pytest.raises(ValueError, match="kind must be MemoryLayer or a class derived from it, got"):
        add_memory(VisionTransformer(), MEMORY, r"blocks\.1\.mlp", kind=kind)


@pytest.mark.promise(
    "Heads and classes", "a memory at a part of torch's `TransformerEncoderLayer` or `MultiheadAttention`", "refused",
    "name the layer: they use the weights of their parts without a call, the first in eval mode alone",
)  # fmt: skip
@pytest.mark.parametrize("mode", ["parallel", "replace"])
def test_a_part_that_is_never_called_is_refused(mode):
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)}))
    for name in ("0.linear1", "0.norm1", "0.self_attn", "0.self_attn.out_proj", "1.attention.out_proj"):
        with pytest.raises(ValueError, match=f"layers must name modules that are called, got '{name}', .* name '[01]"):
            add_memory(model, MEMORY, [name], mode=mode)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_makes_nested_tensors_is_said():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    add_memory(encoder, MEMORY, ["layers.1"], mode="parallel")
    x, is_padding = torch.randn(2, 3, 16), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad(), pytest.raises(ValueError, match="x must be a plain tensor, .* enable_nested_tensor=False"):
        encoder(x, src_key_padding_mask=is_padding)


@pytest.mark.promise(
    "Masks",
    "masks in an `nn.Module` that is not of transformers",
    "supported",
    "where its forward takes `attention_mask`",
)
def test_a_mask_reaches_the_memory_of_a_module_that_takes_one():
    model = add_memory(Masked(), MEMORY, "block.mlp", mode="parallel").train()
    (memory,) = memory_layers(model).values()
    ids = torch.randint(40, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    with UsageMeter(memory) as meter:
        model(ids, attention_mask=mask)
        model(ids, mask)
        assert meter.report().tokens == 20
        model(ids)
        assert meter.report().tokens == 32
    assert in_progress() == ()


def test_two_models_are_independent():
    first, second = (add_memory(VisionTransformer(), MEMORY, r"blocks\.1\.mlp") for _ in range(2))
    before = copy.deepcopy(second.state_dict())
    optimizers = [MemoryAdamW(model, lr=0.1, value_lr=0.1) for model in (first, second)]
    x = torch.randn(4, 3, 8, 8)
    first(x).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in second.state_dict().items())
