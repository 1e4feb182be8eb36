"""The gate: no speed without a right result.

A token is compared where its K-th and its next best score are apart: with rounding between them, either slot is right.
Letters: T tokens, D model width, H heads, K neighbours, N sub-keys, S slots, V value width.
"""

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayers.bench.baselines import TextbookMemory, grid_topk
from memlayers.bench.layers import layer_gradients, make_layer, make_minimal, make_table, make_textbook, table_of
from memlayers.bench.shapes import Shape
from memlayers.checks import CommandFailed
from memlayers.layer import MemoryLayer
from memlayers.ops.row_step import adam, row_adam_
from memlayers.ops.row_sum import Part
from memlayers.ops.select import select_pairs
from memlayers.optim import RowAdam
from memlayers.storage.low_bits import LowBitTable
from memlayers.values import ValueTable

# Of float32 sums in another order: relative to the number, and to the largest of its tensor.
RELATIVE, ABSOLUTE = 1e-3, 2e-5
_ROUNDED = 0.9  # outputs in 16 bits from those in float32, of their norm; of other tokens they are 1.4 away
_MARGIN = 2e-5  # scores closer than this may change places
_TOKENS = 64
_TABLE_ELEMENTS = 2**24  # of the tables that the gate makes
_STEPS = 3
_ROWS = 16  # of a row step at full size


class GateError(CommandFailed):
    """A result is wrong, so there are no speeds to report."""


def check(shape: Shape, device: torch.device) -> None:
    """Hold the operations, the layer and its training step to the references. Raises `GateError`.

    Gradients of whole tables are compared, so this is for `smaller_shapes` of what is timed.
    """
    torch.manual_seed(0)
    check_operations(shape, device)
    check_layer(shape, device)
    check_steps(shape, device)


def smaller_shapes(shape: Shape) -> list[Shape]:
    """Layers whose tables are small enough to check all gradients, which together have every size of `shape`."""
    tokens = max(2, min(shape.tokens, _TOKENS))
    narrow = max(8, min(shape.value_dim, _TABLE_ELEMENTS // shape.slots))
    fewer = max(shape.topk, min(shape.num_subkeys, int((_TABLE_ELEMENTS / shape.value_dim) ** 0.5)))
    same_dim = shape.dim == shape.value_dim
    search = dataclasses.replace(shape, value_dim=narrow, dim=narrow if same_dim else shape.dim, tokens=tokens)
    width = dataclasses.replace(shape, num_subkeys=fewer, tokens=tokens)
    return [search] if search == width else [search, width]


def check_operations(shape: Shape, device: torch.device) -> None:
    """Selection against the grid of pairs, read against `F.embedding_bag`."""
    first_N, second_N = torch.randn(2, shape.heads, shape.tokens, shape.num_subkeys, device=device)
    check_selection(shape, first_N, second_N)
    slots_TK = torch.randint(shape.slots, (shape.tokens, shape.heads * shape.topk), device=device)
    for dtype in (torch.float32, torch.bfloat16):
        table = table_of(make_table(shape, device).to(dtype))
        check_read(shape, table, slots_TK, torch.rand(slots_TK.shape, device=device))


@torch.no_grad()
def check_selection(shape: Shape, first_N: Tensor, second_N: Tensor) -> None:
    """`select_pairs` finds scores and slots of the best pairs."""
    scores_K, slots_K = select_pairs(first_N, second_N, shape.topk)
    row_K = torch.div(slots_K, shape.num_subkeys, rounding_mode="floor")
    found_K = first_N.gather(-1, row_K) + second_N.gather(-1, slots_K - row_K * shape.num_subkeys)
    _require(shape, "scores of select", scores_K, grid_topk(first_N, second_N, shape.topk)[0])
    _require(shape, "slots of select", found_K, scores_K)


@torch.no_grad()
def check_read(shape: Shape, table: ValueTable, slots_TK: Tensor, weights_TK: Tensor) -> None:
    """`ValueTable.read` sums the rows; those of a table of few bits are the floats that they stand for."""
    few = slice(min(_TOKENS, len(slots_TK)))  # so that the exact sum of a narrow table may convert its rows
    if isinstance(table, LowBitTable):
        what, rows_TKV = f"table of {table.bits} bits", table.dequantised(slots_TK[few])
    else:
        what, rows_TKV = f"{table.weight.dtype} table", F.embedding(slots_TK[few], table.weight)
    expected_TV = (rows_TKV.double() * weights_TK[few, :, None].double()).sum(1)
    _require(shape, f"read of a {what}", table.read(slots_TK, weights_TK)[few], expected_TV)


@torch.no_grad()
def check_16_bits(shape: Shape, what: str, found: object, expected_TD: Tensor) -> None:
    """Outputs in 16 bits are near those in float32: some of the rows that rounded queries find are others."""
    assert isinstance(found, Tensor)
    far = ((found.float() - expected_TD).norm() / expected_TD.norm()).item()
    if not far < _ROUNDED:
        raise GateError(f"wrong result, so no speeds: at {shape.name} {what}: {far:.3g} from float32, relative")


@torch.no_grad()
def check_update(shape: Shape, table_SV: Tensor, states: tuple[Tensor, Tensor, Tensor], part: Part) -> None:
    """A first step of `RowAdam`, in place, on moments and counts of zeros: some rows that were read, and some others.

    Against the rule in float64; a bfloat16 table to a unit in its last place.
    """
    slots_TR, weights_TR, grad_TV = part
    is_unread_S = torch.ones(len(table_SV), dtype=torch.bool, device=table_SV.device)
    is_unread_S[slots_TR.flatten()] = False
    read_P = slots_TR.flatten()[:_ROWS].unique()
    unread_P = is_unread_S.nonzero().flatten()[:_ROWS]
    before_PV, kept_PV = table_SV[read_P].double(), table_SV[unread_P]
    rule = {"lr": 1.0, "beta1": 0.9, "beta2": 0.999, "eps": 0.1}
    seed = 0 if torch.bfloat16 in (table_SV.dtype, states[0].dtype) else -1
    row_adam_(table_SV, *states, [slots_TR], [weights_TR], [grad_TV], **rule, seed=seed)
    weights_PT = torch.stack([torch.where(slots_TR == slot, weights_TR.double(), 0).sum(1) for slot in read_P])
    grad_PV = weights_PT @ grad_TV.double()
    zero_PV = torch.zeros_like(grad_PV)
    step_PV, *moments = adam(grad_PV, zero_PV, zero_PV, torch.zeros_like(read_P), **rule)
    what = f"row step of a {table_SV.dtype} table"
    of_moments = 2**-7 if states[0].dtype == torch.bfloat16 else RELATIVE
    for name, state_SV, expected_PV in zip(("first", "second"), states, moments, strict=False):
        _require(shape, f"{name} moments in a {what}", state_SV[read_P], expected_PV, of_moments)
    relative = 2**-7 if table_SV.dtype == torch.bfloat16 else RELATIVE
    _require(shape, what, table_SV[read_P], before_PV - step_PV, relative)
    if not torch.equal(table_SV[unread_P], kept_PV):
        raise GateError(f"wrong result, so no speeds: at {shape.name} a {what} changes rows that were not read")


def check_layer(shape: Shape, device: torch.device) -> None:
    """Outputs and every gradient in training, outputs in evaluation: as the textbook and the one-page layer."""
    textbook = make_textbook(shape, make_table(shape, device))
    layer = make_layer(textbook, shape)
    modules: dict[str, nn.Module] = {"textbook layer": textbook}
    if shape.value_dim == shape.dim:
        modules["one-page layer"] = make_minimal(textbook, shape)
    x_TD = torch.randn(shape.tokens, shape.dim, device=device)
    check_outputs(shape, layer, textbook, x_TD)
    clear_T = clear_tokens(shape, textbook.train(), x_TD)
    grad_TD = torch.where(clear_T[:, None], torch.randn_like(x_TD), 0)
    y_TD, grad_x_TD = _run(layer.train(), x_TD, grad_TD)
    own = {"x": grad_x_TD, **layer_gradients(layer)}
    for name, module in modules.items():
        y_other_TD, grad_other_TD = _run(module.train(), x_TD, grad_TD)
        _require(shape, f"output against the {name}", y_TD[clear_T], y_other_TD[clear_T])
        other = {"x": grad_other_TD, **{key: value.grad for key, value in module.named_parameters()}}
        _require_all(shape, f"against the {name}", own, other)


@torch.no_grad()
def check_outputs(shape: Shape, layer: MemoryLayer, textbook: TextbookMemory, x_TD: Tensor) -> None:
    """Outputs in evaluation against the textbook layer's, under `no_grad` and in inference mode."""
    clear_T = clear_tokens(shape, textbook.eval(), x_TD)
    expected_TD = textbook(x_TD)[clear_T]
    _require(shape, "output in evaluation", layer.eval()(x_TD)[clear_T], expected_TD)
    with torch.inference_mode():
        y_TD = layer(x_TD)[clear_T]
    _require(shape, "output in inference mode", y_TD, expected_TD)


def check_steps(shape: Shape, device: torch.device) -> None:
    """A few steps on the same tokens from zero state, where lazy and dense Adam are the same.

    A row that is not read has no moments and a gradient of zero, so dense Adam leaves it where it is.
    """
    textbook = make_textbook(shape, make_table(shape, device))
    start_SV = textbook.values.detach().clone()
    layer = make_layer(textbook, shape).train()
    layer.values.weight = nn.Parameter(start_SV.clone())
    x_TD = torch.randn(shape.tokens, shape.dim, device=device)
    clear_T = clear_tokens(shape, textbook.train(), x_TD)
    grad_TD = torch.where(clear_T[:, None], torch.randn_like(x_TD), 0)
    # A large eps: where terms cancel, Adam would make as much of their rounding as of a gradient.
    rows = RowAdam(layer.values, lr=1e-2, eps=0.1)
    dense = torch.optim.Adam([textbook.values], lr=1e-2, eps=0.1)
    pairs: tuple[tuple[nn.Module, torch.optim.Optimizer], ...] = ((layer, rows), (textbook, dense))
    for _ in range(_STEPS):
        for module, optimizer in pairs:
            module.zero_grad()
            module(x_TD).backward(grad_TD)
            optimizer.step()
    with torch.no_grad():
        moved_SV, expected_SV = layer.values.weight - start_SV, textbook.values - start_SV
        _require(shape, f"{_STEPS} steps of RowAdam against dense Adam", moved_SV, expected_SV)
    rows.release()


@torch.no_grad()
def draw_tokens(shape: Shape, textbook: TextbookMemory) -> Tensor:
    """Random tokens [T, D] for a layer in evaluation, of which the first can be compared."""
    x_TD = torch.randn(shape.tokens + 15, shape.dim, device=textbook.values.device)
    clear_T = clear_tokens(shape, textbook, x_TD)
    return x_TD[clear_T.int().sort(descending=True, stable=True).indices][: shape.tokens].contiguous()


@torch.no_grad()
def clear_tokens(shape: Shape, textbook: TextbookMemory, x_TD: Tensor) -> Tensor:
    """The tokens [T] whose K best slots rounding cannot change. Raises `GateError` if they are not most."""
    statistics = {name: value.clone() for name, value in textbook.named_buffers()}
    more = min(shape.topk + 1, shape.num_subkeys)
    scores_THK, _ = textbook.search(x_TD, more)
    textbook.load_state_dict(statistics, strict=False)  # looking must not train BatchNorm
    if more == shape.topk:
        return torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device)
    clear_T = (scores_THK[..., -2] - scores_THK[..., -1] > _MARGIN).all(-1)
    if 2 * clear_T.sum() < len(x_TD):
        raise GateError(f"{shape.name}: scores are too close to compare slots: {clear_T.sum()} of {len(x_TD)} tokens")
    return clear_T


def _run(module: nn.Module, x_TD: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    x_TD = x_TD.clone().requires_grad_()
    y_TD = module(x_TD)
    y_TD.backward(grad_TD)
    return y_TD.detach(), x_TD.grad


def _require_all(
    shape: Shape, what: str, found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]
) -> None:
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    for name, reference in expected.items():
        own = found[name]
        if own is None or reference is None:
            raise GateError(f"wrong result, so no speeds: at {shape.name} no gradient of {name} {what}")
        # BatchNorm takes the mean out, so that the exact gradient of the bias before it is zero, and neither is.
        if name == "query.bias":
            scale = found["norm.bias"]
            assert scale is not None
            own, reference = own / scale.abs().max() + 1, reference / scale.abs().max() + 1
        _require(shape, f"gradient of {name} {what}", own, reference)


def _require(shape: Shape, what: str, found: Tensor, expected: Tensor, relative: float = RELATIVE) -> None:
    found, expected = found.double(), expected.double()
    wrong = (found - expected).abs() - relative * expected.abs()
    if not wrong.max() <= ABSOLUTE * expected.abs().max():  # not (...) so that NaN fails, too
        off = (found - expected).abs().max() / expected.abs().max()
        raise GateError(
            f"wrong result, so no speeds: at {shape.name} ({shape.describe()}) "
            f"{what} is off by {off:.1e} of the largest"
        )
