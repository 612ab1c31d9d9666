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
from everystep.upkeep.mirror import Mirrored, mirror
from everystep.upkeep.nearest import NearestVault
from everystep.upkeep.repack import Repacked, repack
from everystep.upkeep.replicate import Lag, Replicator, lag_of
from everystep.upkeep.retention import DROP, KEEP, THIN, Decision, Kept, drops_most, plan
from everystep.upkeep.stats import RunStats, Share, measure_run
from everystep.upkeep.transfer import Carried, Carrier, waiting

__all__ = [
    "DROP",
    "KEEP",
    "THIN",
    "Carried",
    "Carrier",
    "CheckReport",
    "Checked",
    "Decision",
    "Finding",
    "Freed",
    "Kept",
    "Lag",
    "Mirrored",
    "NearestVault",
    "Repacked",
    "Replicator",
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
    "lag_of",
    "measure_run",
    "mirror",
    "plan",
    "repack",
    "waiting",
]
