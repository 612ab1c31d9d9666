"""Every setting, once: its default, its unit, and why it is what it is."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "0.1.0"
FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What can be tuned. Pass one to `everystep.open(place, settings=Settings(...))`."""

    chunk_bytes_max: int = 4 << 20
    """Largest chunk: the unit that is hashed, encoded and read. Part of the format: written into each manifest."""

    small_leaf_bytes: int = 1 << 20
    """Boxes below this share chunks with others of the same role and dtype. Part of the format, as above."""

    pack_bytes_max: int = 64 << 20
    """A pack is closed when it reaches this; one PUT of at most 64 MiB needs no multipart upload."""

    zstd_level: int = 1
    """Level 1 of zstd: on byte planes of real weights, higher levels gain under .5 % and cost 3 times the time."""

    sample_bytes: int = 16 << 10
    """How much of a plane is tried before deciding whether compressing it pays: more costs over 5 % of the encoding."""

    worth_ratio: float = 0.97
    """A plane is stored raw unless its sample shrinks below this share."""

    base_ratio: float = 0.97
    """A chunk is encoded against its base only where that comes below this share of standing alone."""

    base_depth_max: int = 3
    """Longest chain of bases: a restore reads at most this many links more. With 8 a history of full states takes
    .007 of raw less, and a restore twice as long."""

    base_depth_small: int = 7
    """The same where each link takes under an eighth of the state: so few bytes are read fast."""

    base_depth_slow: int = 1
    """The same where the store is slow: there a restore takes as long as its bytes do."""

    base_ratio_slow: float = 0.3
    """As `base_ratio`, where the store is slow."""

    slow_bytes_per_second: int = 200_000_000
    """A store that never took more in the last saves is slow."""

    anchor_ratio: float = 0.5
    """As `base_ratio`, where rules drop checkpoints: what leans on an anchor keeps it from being freed."""

    anchor_every: int = 8
    """Where rules drop checkpoints, every so many stand alone, and the others lean on the newest of these."""

    memory_bytes_max: int = 0
    """Most memory that saving takes beside the state; 0: half of the machine's. Over it, no base is kept; where not
    even one copy of the state has room, training waits for its saves."""

    undo_seconds: float = 7 * 86400.0
    """How long what `forget` drops can be brought back, by the store's own clock. What a run's own `keep=` drops is
    freed at once: that the disk does not fill is why the rule was given."""

    workers: int = 2
    """Threads that encode and decode. On CPU-only training they contend with the training itself."""

    readers: int = 0
    """Threads that only read, ahead of those that decode; 0: as many as the place can use, which on a disk is none:
    there each of those that decode reads for itself."""

    host_ranks: int = 0
    """Processes of this job on this host; 0: as the launcher says. What all of them read of a store, one of them
    fetches; 1: each for itself."""

    background_nice: int = 10
    """How far the threads that encode and write step back behind those that train."""

    frozen_check_every: int = 10
    """Leaves that are declared frozen are compared in full at every so many saves."""

    put_attempts: int = 3
    """How often an upload is tried, each time under a new name."""

    retry_seconds: float = 0.05
    """First pause between attempts; doubled each time."""

    uploads: int = 8
    """Packs on their way to a store at once; each is held until it has arrived. On a disk it is always one."""

    request_seconds: float = 30.0
    """How long a store may be silent in a request that reads, or creates a record."""

    upload_seconds: float = 300.0
    """How long one upload of a pack may take in all."""

    outage_seconds: float = 120.0
    """For how long a request that a store does not answer is made again."""

    takeover_seconds: float = 600.0
    """How long an owner that may be alive is waited for before its run is taken over."""

    rank_deadline_seconds: float = 600.0
    """How long the coordinator waits for the receipts of all ranks before it abandons a save."""

    behind_seconds: float = 600.0
    """How long `close` waits until all checkpoints are in the place behind, where there is one."""

    poll_seconds: float = 0.2
    """Shortest pause between two looks at the log or at receipts while waiting for somebody else; it grows to a tenth
    of what was waited already."""

    polls_per_second: float = 500.0
    """How often all ranks together look at the log while they wait for a commit: a tenth of what one prefix of S3
    answers."""

    volume_records: int = 100
    """Records of a log that one more object holds together, so that a long log is read in few requests; then ten times
    and a hundred times as many. 0: none are written."""

    series_steps_max: int = 100_000
    """Metrics of this many steps are held in memory between two saves; older ones are dropped with a warning."""


DEFAULT = Settings()

LIMITS: dict[str, tuple[float, float]] = {
    "chunk_bytes_max": (4096, 1 << 30), "small_leaf_bytes": (0, 1 << 62), "pack_bytes_max": (1, 1 << 40),
    "zstd_level": (1, 22), "sample_bytes": (0, 1 << 30), "worth_ratio": (0, 1),
    "base_ratio": (0, 1), "base_depth_max": (0, 60), "base_depth_small": (0, 60), "base_depth_slow": (0, 60),
    "base_ratio_slow": (0, 1), "slow_bytes_per_second": (0, float("inf")),
    "anchor_ratio": (0, 1), "anchor_every": (1, 1 << 30),
    "memory_bytes_max": (0, 1 << 62), "undo_seconds": (0, float("inf")), "workers": (1, 1024),
    "readers": (0, 1024),
    "host_ranks": (0, 1 << 20), "background_nice": (0, 19), "frozen_check_every": (1, 1 << 30),
    "put_attempts": (1, 1000), "retry_seconds": (0, 3600),
    "uploads": (1, 1024), "request_seconds": (0.01, 86400), "upload_seconds": (0.01, 86400),
    "outage_seconds": (0, float("inf")), "takeover_seconds": (0, float("inf")),
    "rank_deadline_seconds": (0, float("inf")), "behind_seconds": (0, float("inf")), "poll_seconds": (0, 3600),
    "polls_per_second": (1e-3, 1e9), "volume_records": (0, 10_000), "series_steps_max": (1, 1 << 40),
}  # fmt: skip
"""Least and most of each. Outside of them a save would not end, or could not be read again."""
