"""Tables that are not floats beside their model: classes of `ValueTable`, and where they are made.

Read `rows` first (a file of rows as a tensor, and the rows asked for ahead of use; `advice` tells the system of many
stretches of a file at once), then `draw` (fresh rows, by slot), `undo` (what a row was before it changed), `folder`
(the files of one table, and its checkpoints), `mapped` (`MappedTable` and `MappedFile`). Beside them stand `low_bits`,
a table of 8 or 4 bits a number, `saved`, a table that is read straight from the file that it was saved to, and `host`,
a table in the memory of the host of a GPU (`HostTable` and `HostMemory`). `costs` calculates what a step moves.
"""

from memlayers.storage.costs import StepBytes, step_bytes
from memlayers.storage.host import HostMemory, HostTable
from memlayers.storage.mapped import MappedFile, MappedTable

__all__ = ["HostMemory", "HostTable", "MappedFile", "MappedTable", "StepBytes", "step_bytes"]
