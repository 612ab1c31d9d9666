"""Look after a repository: check it."""

from everystep.upkeep.fsck import Checked, CheckReport, Finding, check_repository

__all__ = ["CheckReport", "Checked", "Finding", "check_repository"]
