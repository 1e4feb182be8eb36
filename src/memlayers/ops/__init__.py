"""The operations of a memory: select, read and its gradients, record, row update. One file an operation."""

import os

# Threads do not survive a fork: how kernels tell a forked process (`memlayers.ops.cpu.launch`).
IMPORTED_IN = os.getpid()
