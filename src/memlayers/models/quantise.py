"""quantize_memory: the tables of a model's memories in 8 or 4 bits a number, for inference."""

from typing import TypeVar

from torch import nn

from memlayers.distributed.wrapping import keep_out_of_ddp
from memlayers.layer import memory_layers
from memlayers.models.classes import MemoryMixin, redeclared
from memlayers.models.modules import memories_in, unwrap
from memlayers.storage.low_bits import LowBitTable, low_bit_table
from memlayers.values import ValueTable

Model = TypeVar("Model", bound=nn.Module)


def quantize_memory(model: Model, bits: int = 8) -> Model:
    """Rounds the tables of a model's memories to integers of 8 or 4 bits, each row with its best scale, in place.

    The model then takes a quarter or an eighth of the bytes for them, and reads more rows a second. It is for
    inference: the tables are trained by nobody. `save_memory` and `save_pretrained` save them as they are, and
    `load_memory` and `from_pretrained` load them. To go from a folder of floats to such tables without a whole table
    of floats in memory, ``load_memory(base, folder, values="int8")``.

    Args:
        model: any module with memories; one that `torch.compile`, PEFT or `DistributedDataParallel` is around, too.
            Tables that are of few bits already, beside others, stay as they are.
        bits: 8, which changes hardly anything, or 4.

    Returns:
        `model` itself. Its tables are `memlayers.storage.low_bits.LowBitTable`; a table that several memories share is
        still one.

    Raises:
        ValueError: a model without memories; other bits; tables that are not whole and of floats in memory, have a row
            optimizer, or hold numbers that are not finite. The model is then as it was.
    """
    inner = unwrap(model)
    made: dict[ValueTable, LowBitTable] = {}
    tables = dict.fromkeys(memory.values for memory in memories_in(inner).values())
    for table in [table for table in tables if not isinstance(table, LowBitTable)] or tables:
        made[table] = low_bit_table(table, bits)
    if isinstance(inner, MemoryMixin):
        with redeclared(inner, value_bits=bits):
            _exchange(inner, made)
    else:
        _exchange(inner, made)
    keep_out_of_ddp(inner)
    return model


def _exchange(model: nn.Module, made: dict[ValueTable, LowBitTable]) -> None:
    for memory in memory_layers(model).values():
        memory.values = made.get(memory.values, memory.values)
