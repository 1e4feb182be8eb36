import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # a function is compiled at most eight times in a process
        torch._dynamo.reset()
