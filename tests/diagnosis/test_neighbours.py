"""K that is ignored between the configuration and the read."""

import pytest
import torch

from memlayers import MemoryLayer, doctor
from memlayers.optim import MemoryAdamW


class FewerKeys(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.keys.topk = 2


class FewerRows(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.values.register_forward_pre_hook(lambda module, args: (args[0][..., :2], args[1][..., :2]))


class OneWeight(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.values.register_forward_pre_hook(
            lambda module, args: (args[0], torch.where(args[1] == args[1].amax(-1, keepdim=True), args[1], 0))
        )


class SameSlots(MemoryLayer):
    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.keys.register_forward_hook(
            lambda module, args, hits: hits._replace(slots=hits.slots[..., :1].expand_as(hits.slots).contiguous())
        )


class BestSlotAgain(MemoryLayer):
    def read(self, x_TD, slots_THK, weights_THK):
        return super().read(x_TD, slots_THK[..., :1].expand_as(slots_THK), weights_THK)


class SlotsOfOneHead(MemoryLayer):
    def read(self, x_TD, slots_THK, weights_THK):
        return super().read(x_TD, slots_THK[:, :1].expand_as(slots_THK), weights_THK)


class AlmostOneWeight(MemoryLayer):
    def weigh(self, scores_THK):
        return torch.cat([scores_THK[..., :1].softmax(-1), 1e-30 * scores_THK[..., 1:].exp()], -1)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (BestSlotAgain, "distinct rows a token are read where the search found"),
        (SlotsOfOneHead, "distinct rows a token are read where the search found"),
        (AlmostOneWeight, "66.7% of the weights of neighbours are zero"),
        (FewerKeys, "search 2 slots, the configuration says topk = 3"),
        (FewerRows, "2 rows a token are read instead of 2 x 3"),
        (OneWeight, "of the weights of neighbours are zero"),
        (SameSlots, "the same slot twice"),
    ],
)
def test_k_is_ignored(make_block, batch, layer, says, found, fails):
    report = doctor(make_block(layer=layer), batch)
    assert found(report, "neighbours").message.startswith("K is ignored")
    fails(report, "neighbours", says)


class Neurons(MemoryLayer):
    """A weight is a score that a relu may set to zero."""

    def read(self, x_TD, slots_THK, weights_THK):
        return super().read(x_TD, slots_THK, weights_THK * x_TD[:, :1, None].relu())


def test_weights_that_are_zero_by_design_are_a_warning(make_block, batch, found):
    block = make_block(layer=Neurons)
    report = doctor(block, batch, optimizer=MemoryAdamW(block))
    assert report.ok, report
    assert found(report, "neighbours").state == "warn"
    assert "which `read` sets to zero" in found(report, "neighbours").message


class NoRead(MemoryLayer):
    def read(self, x_TD, slots_THK, weights_THK):
        return weights_THK.flatten(1).sum(-1, keepdim=True).expand(-1, self.config.width) * x_TD


def test_no_row_is_read(make_block, batch, fails):
    fails(doctor(make_block(layer=NoRead), batch), "neighbours", "no row of the table is read")


class SameSlotNowAndThen(MemoryLayer):
    """The second slot of one token is its first."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.keys.register_forward_hook(self.repeat)

    def repeat(self, module, args, hits):
        slots = hits.slots.clone()
        slots[0, 0, 1] = slots[0, 0, 0]
        return hits._replace(slots=slots)


def test_one_slot_that_comes_twice_is_enough(make_block, batch, fails):
    fails(doctor(make_block(layer=SameSlotNowAndThen), batch), "neighbours", "the same slot twice")


@pytest.mark.parametrize(("tokens", "state"), [(4, "warn"), (40, "fail")])
def test_few_weights_that_are_zero_are_a_warning(make_block, batch, found, tokens, state):
    class Zeros(MemoryLayer):
        def weigh(self, scores_THK):
            keep = (torch.arange(len(scores_THK)) >= tokens)[:, None, None] | (torch.arange(3) < 2)
            return torch.where(keep, scores_THK.softmax(-1), 0)

    assert found(doctor(make_block(layer=Zeros), batch), "neighbours").state == state  # of 128: 1 % and 10 %
