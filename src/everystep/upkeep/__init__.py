"""Look after a repository: check it."""

from everystep.upkeep.fsck import CheckReport, Finding, check_repository

__all__ = ["CheckReport", "Finding", "check_repository"]
