"""What a load did: which leaves came in, which did not, and whether the run goes on exactly."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """The outcome of a load, leaf by leaf (paths as `show` prints them)."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Wanted by what is loaded into, not in the checkpoint."""
    unexpected: list[str] = field(default_factory=list)
    """In the checkpoint, not wanted."""
    reshaped: list[str] = field(default_factory=list)
    """Of another shape or element type; left as they were."""
    inexact: list[str] = field(default_factory=list)
    """Reasons why a run that goes on from here may differ from one that was never interrupted."""

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def exact(self) -> bool:
        """Whether the continuation is the run that was never interrupted."""
        return self.complete and not self.inexact

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} leaves loaded"]
        for title in ("missing", "unexpected", "reshaped", "inexact"):
            entries = getattr(self, title)
            if entries:
                more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
                lines.append(f"{title}: {', '.join(entries[:8])}{more}")
        return "\n".join(lines)
