"""Words: what slots say, as the words of the model's vocabulary whose logits their values raise most.

Letters: D model width, V value width, R slots, C words of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memlayers.diagnosis.subjects import Subject
from memlayers.memory_plus import MemoryPlus
from memlayers.torch_private import without_compiled_graphs

LOGITS_AT_ONCE = 2**24  # 64 MB


class Words:
    """The direct way of a value to the logits of a causal language model: the "logit lens" of one row.

    A value goes through the memory's output projection, the gate of a memory beside a network, the final norm's gain,
    and the output embedding. The norm divides by the size of the whole hidden state, which moves all logits alike: it
    is left out, and so are biases, which the value does not change. What later blocks make of the value is not seen.

    Args:
        model: with `get_output_embeddings`, as models of `transformers` have it.
        ids: [1, T] of a call that shows which module is the final norm.
    """

    def __init__(self, model: nn.Module, ids: Tensor):
        self.head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
        self.norm = None if self.head is None else _final_norm(model, self.head, ids)
        self.gain = None if self.norm is None else _gain(self.norm)

    def way(self, subject: Subject) -> str:
        """In a sentence, what is done to the values of a memory."""
        if self.head is None:
            return "The model has no output embedding, so values are not turned into words."
        steps = ["the memory's output projection"] if not isinstance(subject.layer.output, nn.Identity) else []
        steps += ["its gate"] if subject.gate is not None else []
        steps += [f"the gain of the final {type(self.norm).__name__} (not its scale)"] if self.norm is not None else []
        steps += ["the output embedding, without biases"]
        note = " The memory's input gate, which differs by token, counts as one." if _is_gated(subject) else ""
        return f"Nearest words: those whose logits a slot's value raises most, by way of {', '.join(steps)}.{note}"

    @torch.no_grad()
    def nearest(self, subject: Subject, slots: Sequence[int] | Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Ids and logits [R, most] of the nearest words of slots, best first; without an output embedding [R, 0]."""
        rows = torch.as_tensor(slots, dtype=torch.int64, device=subject.table.row_mark.device)
        if self.head is None or not len(rows):
            return torch.zeros(len(rows), 0, dtype=torch.int64), torch.zeros(len(rows), 0)
        like = next(self.head.parameters())
        none_C = self.head(torch.zeros(1, subject.layer.config.dim, device=like.device, dtype=like.dtype))
        found = []
        for some in rows.split(max(1, LOGITS_AT_ONCE // none_C.shape[-1])):
            logits_RC = self.head(self.pushed(subject, some).to(like)) - none_C
            found.append([one.cpu() for one in logits_RC.float().topk(min(most, none_C.shape[-1]))])
        scores, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ids, scores

    @torch.no_grad()
    def pushed(self, subject: Subject, rows: Tensor) -> Tensor:
        """What values [R, D] add to the hidden states, times the gain of the final norm."""
        layer = subject.layer
        pushed_RD = layer.output(values_of(subject, rows).to(layer.keys.weight)).float()
        if subject.gate is not None:
            pushed_RD = pushed_RD * subject.gate.float()
        if self.gain is not None:
            gain_D, is_centred = self.gain
            pushed_RD = (pushed_RD - pushed_RD.mean(-1, keepdim=True) if is_centred else pushed_RD) * gain_D
        return pushed_RD


@torch.no_grad()
def values_of(subject: Subject, rows: Tensor) -> Tensor:
    """The values [R, V] of slots in float32, by the read of their table, which may keep them anywhere, in any form."""
    return subject.table.read(rows[:, None], torch.ones(len(rows), 1, device=rows.device))


def _is_gated(subject: Subject) -> bool:
    return isinstance(subject.layer, MemoryPlus)


@torch.no_grad()
def _final_norm(model: nn.Module, head: nn.Module, ids: Tensor) -> nn.Module | None:
    """The norm whose output is what the output embedding is given; None if it is given something else."""
    outputs: dict[tuple[int, tuple[int, ...]], nn.Module] = {}
    given: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[output.data_ptr(), tuple(output.shape)] = module

    norms = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 1]
    handles = [module.register_forward_hook(keep) for module in norms]
    handles.append(head.register_forward_pre_hook(lambda module, args: given.append(args[0])))
    try:
        with without_compiled_graphs():  # which would not call the hooks
            model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return outputs.get((given[-1].data_ptr(), tuple(given[-1].shape))) if given else None


@torch.no_grad()
def _gain(norm: nn.Module) -> tuple[Tensor, bool]:
    """The gain [D] of a norm, and whether it takes off the mean: found by asking it, for each family has its own way.

    A vector of ones and minus ones has a mean of zero and a size of one, so a norm multiplies it by the gain alone.
    """
    like = next(norm.parameters())
    signs_D = torch.ones(len(like), device=like.device, dtype=like.dtype)
    signs_D[1::2] = -1
    if len(like) % 2:
        signs_D[-3:] = torch.tensor([2.0, -1.0, -1.0])
        signs_D /= signs_D.square().mean().sqrt()
    up_D, down_D = norm(signs_D[None])[0].float(), norm(-signs_D[None])[0].float()
    gain_D = (up_D - down_D) / (2 * signs_D.float())
    of_ones_D = norm(torch.ones_like(signs_D)[None])[0].float() - (up_D + down_D) / 2
    return gain_D, bool(of_ones_D.norm() < 0.5 * gain_D.norm())
