"""One rank, until it is killed: is sent functions with their arguments, and sends back what they return."""

import importlib.util
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Client

import torch


def module(path):
    if path not in sys.modules:
        spec = importlib.util.spec_from_file_location(path, path)
        sys.modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path])
    return sys.modules[path]


def main(address, store, rank, size):
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # collectives have new names in torch 2.13 and warn under the old ones
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
    torch.distributed.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    with Client(address) as connection:
        connection.send_bytes(pickle.dumps(rank))
        while True:
            path, name, arguments = pickle.loads(connection.recv_bytes())
            torch.manual_seed(0)
            try:
                answer = (True, getattr(module(path), name)(rank, *arguments))
            except Exception:
                answer = (False, traceback.format_exc())
            connection.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
