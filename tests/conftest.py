import sys
from pathlib import Path

import pytest
import torch

# What `make test-fast` leaves out: folders and files whose tests train, compile or start processes for seconds.
LONG = (
    "bench", "benchmarks", "diagnosis/test_faults.py", "diagnosis/test_trainer_callback.py",
    "diagnosis/test_untouched.py", "experiments", "lm/data/sources", "lm/data/test_descriptors.py",
    "lm/data/test_prepare.py", "lm/data/test_restart.py", "lm/test_config_presets.py", "lm/test_dry_run.py",
    "lm/test_evaluate.py", "lm/test_faults.py", "lm/test_footprint.py", "lm/test_generate.py",
    "lm/test_golden_losses.py", "lm/test_resume.py", "lm/test_run.py", "lm/test_train.py",
    "models/test_cached_generation.py", "models/test_families.py", "models/test_hf_trainer.py",
    "models/test_classes.py", "models/test_integrations.py", "models/test_masks.py", "models/test_peft.py",
    "models/test_suitable.py", "ops/cpu", "ops/test_gpu_code.py", "ops/test_gpu_dispatch.py",
    "optim/test_distributed.py", "optim/test_trainer.py", "test_cli.py", "test_docs.py", "test_examples.py",
    "test_package.py", "test_readme.py", "test_torch_private.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here)
        if any(path.is_relative_to(long) for long in LONG):
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # a function is compiled at most eight times in a process
        torch._dynamo.reset()
