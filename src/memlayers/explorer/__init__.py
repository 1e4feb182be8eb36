"""Looking into memories: what tokens read, what slots say, and changing slots by hand.

view       `explore`: a page about what memories read and say, from `collect` (what a model reads of a text), `words`
           (what slots say) and `pack` (what fits into a page), with the templates in `page/`
edit       `freeze_slots`, `reset_slots`, `grow_table`
trace      `SlotTrace`: which tokens read which slots, as data
columns    the tables that it returns, for pandas and Parquet
"""

from memlayers.explorer.columns import Columns
from memlayers.explorer.edit import freeze_slots, grow_table, reset_slots
from memlayers.explorer.trace import SlotTrace
from memlayers.explorer.view import explore

__all__ = ["Columns", "SlotTrace", "explore", "freeze_slots", "grow_table", "reset_slots"]
