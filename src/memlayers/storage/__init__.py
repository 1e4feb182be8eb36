"""Tables that are not floats in memory: classes of `ValueTable`, and where they are made.

Read `rows` first (a file of rows as a tensor, and the rows asked for ahead of use), then `draw` (fresh rows, by slot),
`undo` (what a row was before it changed), `folder` (the files of one table, and its checkpoints), `mapped`
(`MappedTable` and `MappedFile`). Beside them stand `low_bits`, a table of 8 or 4 bits a
number, and `saved`, a table that is read straight from the file that it was saved to.
"""

from memlayers.storage.mapped import MappedFile, MappedTable

__all__ = ["MappedFile", "MappedTable"]
