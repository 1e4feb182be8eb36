"""`import memlayers` is quick, silent, and needs torch and numpy only."""

import subprocess
import sys

SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "tokenizers", "accelerate", "safetensors", "jsonargparse"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import numpy, torch, torch.library
before = set(sys.modules)
import memlayers
assert len([name for name in set(sys.modules) - before if name.startswith("memlayers")]) < 5  # the rest comes on demand
slow = {"numba", "triton", "torch._dynamo", "torch._inductor", "matplotlib", "datasets"}
assert slow.isdisjoint(set(sys.modules) - before), slow & (set(sys.modules) - before)
assert not torch.cuda.is_initialized()
config = memlayers.MemoryConfig(dim=8, topk=2, num_subkeys=4, query_dim=4)
layer = memlayers.MemoryLayer(config)
optimizer = memlayers.RowAdam(layer)
layer(torch.randn(3, 8)).sum().backward()
import torch.utils.flop_counter  # which comes after memlayers here, and before it in other tests
assert torch.ops.memlayers.search in torch.utils.flop_counter.flop_registry
for name in memlayers.__all__:
    if name not in ("add_memory", "disable_memory", "load_memory", "quantize_memory", "save_memory"):
        getattr(memlayers, name)
assert memlayers.optim.RowAdam is memlayers.RowAdam
for statement in ("from memlayers import add_memory", "from memlayers.models import causal_lm"):
    try:
        exec(statement)
    except ModuleNotFoundError as error:
        assert str(error) == "memlayers.models needs transformers: pip install 'memlayers[lm]'", error
        assert error.name == "transformers"
    else:
        raise AssertionError
try:
    memlayers.no_such_name
except AttributeError:
    pass
else:
    raise AssertionError
"""


def test_it_needs_torch_and_numpy_only_and_says_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_what_needs_transformers_comes_on_demand():
    import memlayers
    from memlayers import models

    for name in ("add_memory", "disable_memory", "load_memory", "quantize_memory", "save_memory"):
        assert getattr(memlayers, name) is getattr(models, name)


def test_dir_lists_every_public_name():
    import memlayers

    listed = dir(memlayers)
    assert {"MemoryLayer", "RowAdam", "add_memory", "load_memory", "save_memory", "doctor", "__version__"} <= {*listed}
    assert len(listed) == len(set(listed))
