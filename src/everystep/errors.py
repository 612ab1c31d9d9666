"""The tree of errors: what went wrong, where, and what to do now; a stable kind and an exit code on each class."""

from __future__ import annotations


class Error(Exception):
    """Base of everything everystep raises.

    Args:
        what: what happened, one sentence.
        where: the path of the leaf, key, file or id it happened at.
        do: what the reader can do now.
    """

    kind = "error"
    exit_code = 1

    def __init__(self, what: str, *, where: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.do = what, where, do

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.do:
            lines.append(f"  do:    {self.do}")
        return "\n".join(lines)


class UsageError(Error):
    """A call or a command line that makes no sense as given."""

    kind, exit_code = "usage", 2


class NotFound(Error):
    """A repository, run, checkpoint, tag or path of that name does not exist."""

    kind, exit_code = "not-found", 3


class CheckpointRetired(NotFound):
    """The checkpoint existed, and has been dropped since."""

    kind = "retired"


class Damaged(Error):
    """Bytes on disk are not the bytes that were written."""

    kind, exit_code = "damaged", 4


class ForeignRepository(Error):
    """The place holds something, but not an everystep repository."""

    kind, exit_code = "foreign", 5


class NewerFormat(ForeignRepository):
    """The repository was written by a newer everystep."""

    kind = "newer-format"


class Unsupported(Error):
    """A part of the state could only be restored by running code, or has no form on disk."""

    kind, exit_code = "unsupported", 6


class Mismatch(Error):
    """What is in the checkpoint does not fit what it is loaded into."""

    kind, exit_code = "mismatch", 7


class Conflict(Error):
    """The step or name is taken by something else."""

    kind, exit_code = "conflict", 8


class RunInUse(Error):
    """Another living process writes this run."""

    kind, exit_code = "in-use", 9


class RunTakenOver(Error):
    """Another process has taken this run over; this one may not write any more."""

    kind, exit_code = "taken-over", 10


class SaveAbandoned(Error):
    """Not all ranks delivered their part in time; nothing of the save is visible."""

    kind, exit_code = "abandoned", 11
    missing: tuple[int, ...] = ()
    """The ranks that did not deliver."""


class StorageError(Error):
    """The place failed: a disk, a network, a permission."""

    kind, exit_code = "storage", 12


class StorageFull(StorageError):
    """No space, or a quota is used up."""

    kind, exit_code = "full", 13


class Unreachable(StorageError):
    """The place did not answer, or was too busy, for as long as it was asked."""

    kind = "unreachable"


class ReadOnly(StorageError):
    """The place does not let this process write."""

    kind, exit_code = "read-only", 14


class UnsafeStore(StorageError):
    """Several writers on a store that does not keep them apart."""

    kind = "unsafe-store"


class RehearsalFailed(Error):
    """A script could not be rehearsed: it fails, takes too long, or saves nothing."""

    kind, exit_code = "rehearsal", 15
    output: tuple[str, ...] = ()
    """The last lines that the script printed."""


class ObjectMissing(StorageError):
    """There is no object under this key."""

    kind = "missing"


class AlreadyExists(StorageError):
    """A create-only put found the key taken."""

    kind = "exists"


class UnknownOutcome(StorageError):
    """A put may or may not have been applied: its acknowledgement was lost."""

    kind = "unknown-outcome"


class EverystepWarning(UserWarning):
    """Something a careful person would want to know; nothing was lost."""


class DamageWarning(EverystepWarning):
    """Part of the repository is damaged; what was asked for was answered from what is whole."""
