import gc
import json
import os
import random
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

# What `make test-fast` leaves out: files and folders whose tests train, write models, compile or start processes for
# seconds, and tests that compile in others.
LONG = (
    "bench", "benchmarks", "cli/test_failures.py", "cli/test_refusals.py", "diagnosis/test_faults.py",
    "diagnosis/test_trainer_callback.py", "diagnosis/test_untouched.py", "distributed", "experiments", "explorer",
    "finetuning/test_trainer_callback.py", "lm/data/sources", "lm/data/test_descriptors.py",
    "lm/data/test_prepare.py", "lm/data/test_ready_text.py", "lm/data/test_restart.py", "lm/test_config_presets.py",
    "lm/test_dry_run.py", "lm/test_evaluate.py", "lm/test_faults.py", "lm/test_footprint.py", "lm/test_generate.py",
    "lm/test_golden_losses.py", "lm/test_resume.py", "lm/test_retrofit.py", "lm/test_run.py", "lm/test_tables.py",
    "lm/test_train.py", "models/test_cached_generation.py", "models/test_checkpoints.py", "models/test_classes.py",
    "models/test_export.py", "models/test_families.py", "models/test_folder.py", "models/test_heads.py",
    "models/test_hf_trainer.py", "models/test_hostile_folders.py", "models/test_identity.py",
    "models/test_install.py", "models/test_integrations.py", "models/test_load_memory.py", "models/test_masks.py",
    "models/test_named.py", "models/test_peft.py", "models/test_presets.py", "models/test_quantise.py",
    "models/test_quantised.py", "models/test_save_memory.py", "models/test_suitable.py", "models/test_summary.py",
    "models/test_targets.py", "models/test_threads.py", "ops/cpu", "ops/test_gpu_code.py",
    "ops/test_gpu_dispatch.py", "optim/test_distributed_checkpoint.py", "optim/test_gradients_by_hand.py",
    "optim/test_trainer.py", "storage/test_saved.py", "storage/test_undo.py", "test_cli.py", "test_docs.py",
    "test_examples.py", "test_export.py", "test_import.py", "test_package.py", "test_readme.py",
    "test_torch_private.py",
)  # fmt: skip
LONG_NAMES = ("compile", "registered_as_torch_expects")


@pytest.fixture(scope="session")
def write_text():
    """Writes documents in which a word depends on the one before it; returns the name of the file."""

    def write(file, *, documents):
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(50)]
        with open(file, "w") as stream:
            for number in range(documents):
                places = [draw.randrange(50)]
                for _ in range(draw.randint(15, 60)):
                    places.append((3 * places[-1] + draw.randrange(4)) % 50)
                stream.write(json.dumps({"id": number, "text": " ".join(words[place] for place in places)}) + "\n")
        return str(file)

    return write


if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, here and in every process that a test starts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

gc.disable()  # until everything is imported: what that makes stays, and would be looked through again and again


def pytest_collection_modifyitems(items):
    for item in items:
        if is_long(item.path) or any(name in item.name for name in LONG_NAMES):
            item.add_marker(pytest.mark.long)


@cache
def is_long(file):
    path = file.relative_to(Path(__file__).parent)
    return any(path.is_relative_to(long) for long in LONG)


def pytest_collection_finish():
    gc.enable()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks():
    """Tests cut no power: what is written is read from memory. Thousands of calls would wait for milliseconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # a function is compiled at most eight times in a process
        torch._dynamo.reset()
