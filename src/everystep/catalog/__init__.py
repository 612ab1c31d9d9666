"""A searchable view of runs in SQLite: lost or stale, it is made anew from the logs, which alone are the truth."""

from everystep.catalog.expression import Condition, parse
from everystep.catalog.store import Absorbed, Catalog, Entry, Lost

__all__ = ["Absorbed", "Catalog", "Condition", "Entry", "Lost", "parse"]
