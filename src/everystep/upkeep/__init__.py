"""Look after a repository: check it, drop and thin what rules do not keep, free what nothing needs."""

from everystep.upkeep.collect import (
    Freed,
    bring_back,
    can_return,
    check_readable,
    collect,
    drop_events,
    free_unneeded,
    kept_of,
)
from everystep.upkeep.fsck import Checked, CheckReport, Finding, check_repository
from everystep.upkeep.repack import Repacked, repack
from everystep.upkeep.retention import DROP, KEEP, THIN, Decision, Kept, drops_most, plan
from everystep.upkeep.stats import RunStats, Share, measure_run

__all__ = [
    "DROP",
    "KEEP",
    "THIN",
    "CheckReport",
    "Checked",
    "Decision",
    "Finding",
    "Freed",
    "Kept",
    "Repacked",
    "RunStats",
    "Share",
    "bring_back",
    "can_return",
    "check_readable",
    "check_repository",
    "collect",
    "drop_events",
    "drops_most",
    "free_unneeded",
    "kept_of",
    "measure_run",
    "plan",
    "repack",
]
