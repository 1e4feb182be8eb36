import torch
from torch import nn

from memlayers.diagnosis.loss import default_loss


def test_without_a_loss_of_its_own_a_fixed_projection_stands_in_per_token():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    direction = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    expected = (2 * x.float() * direction).sum() / 15  # 15 tokens
    torch.testing.assert_close(default_loss(Twice(), x), expected)
    torch.testing.assert_close(default_loss(Twice(), (x,)), expected)


def test_the_first_floating_tensor_of_an_output_counts():
    class Several(nn.Module):
        def forward(self, x):
            return {"places": torch.arange(3), "found": [None, (x, 2 * x)]}

    class Alone(nn.Module):
        def forward(self, x):
            return x

    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(default_loss(Several(), x), default_loss(Alone(), x))
