"""Several processes, on `torch.distributed` alone: replicas of tables that make the same step, or tables in columns.

`exchange` first: the row gradients of all ranks, gathered at the optimizer's step. Then `agreement`: how ranks do the
same or nothing; `wrapping`: what `DistributedDataParallel` is told; `statistics`: the query's BatchNorm over all ranks;
`columns`: tables of which each rank owns some columns, and `whole`: their files; `wire`: the bytes of a step;
`processes`: those that do a whole piece of work together, as `memlayers train` does.
"""

from memlayers.distributed.agreement import check_replicas
from memlayers.distributed.columns import shard_tables
from memlayers.distributed.statistics import merge_statistics, sync_statistics
from memlayers.distributed.wire import Layout, Traffic, layouts, traffic

__all__ = [
    "Layout",
    "Traffic",
    "check_replicas",
    "layouts",
    "merge_statistics",
    "shard_tables",
    "sync_statistics",
    "traffic",
]
