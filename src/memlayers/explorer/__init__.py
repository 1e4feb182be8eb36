"""Looking into memories: what tokens read, what slots say, and changing slots by hand.

trace      `SlotTrace`: which tokens read which slots, as data
columns    the tables that it returns, for pandas and Parquet
"""

from memlayers.explorer.columns import Columns
from memlayers.explorer.trace import SlotTrace

__all__ = ["Columns", "SlotTrace"]
