"""Questions about what was kept, answered by pure functions over arrays and plain values."""

from everystep.analysis.compare import LeafChange, ValueChange, compare_leaf, compare_values
from everystep.analysis.describe import LeafSummary, summarize

__all__ = ["LeafChange", "LeafSummary", "ValueChange", "compare_leaf", "compare_values", "summarize"]
