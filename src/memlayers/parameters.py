"""count_parameters: how many parameters a model has, by part."""

from torch import nn

from memlayers.layer import memory_layers
from memlayers.values import value_tables


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part: the memories' query networks, keys and values, the rest of the model, and the total.

    A table that several memories share counts once; an output projection of a memory counts as rest.
    """
    memories = memory_layers(model).values()
    parts = {
        "query": {parameter for layer in memories for parameter in layer.query.parameters()},
        "keys": {parameter for layer in memories for parameter in layer.keys.parameters()},
    }
    tables = {table for layer in memories for table in value_tables(layer.values)}
    # All parameters of a table: it has a companion that is no weight.
    owned = parts["query"] | parts["keys"] | {other for layer in memories for other in layer.values.parameters()}
    counts = {part: sum(parameter.numel() for parameter in parameters) for part, parameters in parts.items()}
    counts["values"] = sum(table.shape.numel() for table in tables)
    counts["rest"] = sum(parameter.numel() for parameter in set(model.parameters()) - owned)
    return {**counts, "total": sum(counts.values())}
