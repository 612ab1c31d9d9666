"""What a run takes up: bytes as they were saved and as they lie there, by role and by codec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from everystep.errors import ObjectMissing
from everystep.upkeep.collect import can_return, sizes_of
from everystep.upkeep.usage import Uses, held
from everystep.vault import CODEC_NAMES, Committed, Manifest, PartView, RunVault, Spot
from everystep.vault.names import record_key, volumes_folder
from everystep.vault.together import together

Progress = Callable[[int, int], None]


@dataclass
class Share:
    """Of a role or codec: bytes as they were saved, and as they lie there."""

    logical_bytes: int = 0
    stored_bytes: int = 0


@dataclass
class RunStats:
    """What a run takes up. All that lies there is `total_bytes`."""

    run: str
    checkpoints: int = 0
    thin: int = 0
    undoable: int = 0
    """Checkpoints that were dropped or thinned and can be brought back."""
    logical_bytes: int = 0
    """What the live checkpoints come to, each by itself."""
    chunk_bytes: int = 0
    """What is stored of them."""
    manifest_bytes: int = 0
    log_bytes: int = 0
    other_bytes: int = 0
    """Held by what can be brought back, attachments, a save under way, or the dead parts of packs."""
    dead_bytes: int = 0
    """Of these, what nothing needs in packs that something is needed of: what a repack may free."""
    roles: dict[str, Share] = field(default_factory=dict)
    """Logical bytes of a role count once for each checkpoint."""
    codecs: dict[str, Share] = field(default_factory=dict)
    """Logical bytes of a codec count once for each stored chunk."""

    @property
    def total_bytes(self) -> int:
        return self.chunk_bytes + self.manifest_bytes + self.log_bytes + self.other_bytes

    @property
    def ratio(self) -> float:
        """Stored bytes per logical byte."""
        return self.total_bytes / self.logical_bytes if self.logical_bytes else 0.0


def measure_run(vault: RunVault, progress: Progress | None = None) -> RunStats:
    """Reads the manifest of every checkpoint that is live or can be brought back, and no chunk.

    Args:
        progress: told (checkpoints done, checkpoints in all).
    """
    while True:
        seen = vault.history().slots
        try:
            return _measure(vault, progress)
        except ObjectMissing:
            if vault.history().slots == seen:
                raise  # nobody freed or moved anything


def _measure(vault: RunVault, progress: Progress | None) -> RunStats:
    history = vault.history()
    found = RunStats(vault.name, len(history.live), len(history.thin & set(history.live)))
    found.undoable = sum(can_return(history, id) for id in history.dropped)
    counted: set[tuple[object, int]] = set()
    uses = Uses()
    for attached in history.attachments.values():
        uses.add_pages(attached.where)
    kept = held(vault, history)
    for count, (id, thin) in enumerate(kept.items(), 1):
        manifest = vault.manifest(history.commits[id])
        uses.add(manifest, history.commits[id].event.root, thin=thin)
        if id in history.live:
            _add(found, history.commits[id], manifest, counted, thin=id in history.thin)
        if progress is not None:
            progress(count, len(kept))
    log = [record_key(vault.folder, slot) for slot in range(history.slots)]
    log += vault.storage.list(volumes_folder(vault.folder))
    found.log_bytes = sum(together(vault.storage, vault.seam, lambda key: _nbytes(vault, key), log))
    sizes = sizes_of(vault)
    found.other_bytes = max(0, sum(sizes.values()) - found.chunk_bytes - found.manifest_bytes)
    found.dead_bytes = sum(uses.dead_bytes(sizes).values())
    return found


def _nbytes(vault: RunVault, key: str) -> int:
    try:
        return int(vault.storage.stat(key).nbytes)
    except ObjectMissing:
        return 0  # what it said is known from elsewhere, or noted as damage


def _add(
    found: RunStats, commit: Committed, manifest: Manifest, counted: set[tuple[object, int]], *, thin: bool
) -> None:
    root = commit.event.root
    for page in (root, *manifest.parts, *(page for view in manifest.views for page in view.placement.pages())):
        place = ((page.writer, page.number), page.offset)
        if place not in counted:
            counted.add(place)
            found.manifest_bytes += page.length
    for view in manifest.views:
        for index in view.there(thin=thin):
            _add_chunk(found, view, index, counted)


def _add_chunk(found: RunStats, view: PartView, index: int, counted: set[tuple[object, int]]) -> None:
    chunk = view.layout.chunks[index]
    role = found.roles.setdefault(view.layout.streams[chunk.stream].role, Share())
    found.logical_bytes += chunk.nbytes
    role.logical_bytes += chunk.nbytes
    for spot in view.spot(index).links():
        if not _count(spot, counted):
            return  # what it leans on was counted with it
        found.chunk_bytes += spot.length
        role.stored_bytes += spot.length
        codec = found.codecs.setdefault(CODEC_NAMES.get(spot.codec, str(spot.codec)), Share())
        codec.logical_bytes += chunk.nbytes
        codec.stored_bytes += spot.length


def _count(spot: Spot, counted: set[tuple[object, int]]) -> bool:
    place = ((spot.pack.writer, spot.pack.number), spot.offset)
    new = place not in counted
    counted.add(place)
    return new
