"""The operations of a memory: select, read and its gradients, record, row update. One file an operation."""
