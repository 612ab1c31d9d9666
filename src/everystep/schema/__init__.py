"""The shapes of things: leaf, dtype, box, tree, and how leaves lie in chunks. NumPy only."""

from everystep.schema.box import NOTHING, Box
from everystep.schema.layout import Chunk, Layout, Region, Stream, lay_out
from everystep.schema.prune import without
from everystep.schema.report import LoadReport
from everystep.schema.tree import (
    ROLES,
    Composite,
    Described,
    Fields,
    Leaf,
    Part,
    Roled,
    Tree,
    flatten,
    join,
    paths_of,
    select,
    unflatten,
)

__all__ = [
    "NOTHING",
    "ROLES",
    "Box",
    "Chunk",
    "Composite",
    "Described",
    "Fields",
    "Layout",
    "Leaf",
    "LoadReport",
    "Part",
    "Region",
    "Roled",
    "Stream",
    "Tree",
    "flatten",
    "join",
    "lay_out",
    "paths_of",
    "select",
    "unflatten",
    "without",
]
