"""One run in a repository: its log, the term a process holds in it, and verified reading of pages and chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from everystep.seam import Pool
from everystep.vault.history import Committed, History
from everystep.vault.log import Log, OpenTerm
from everystep.vault.manifest import Manifest, PartView, Spot, read_manifest
from everystep.vault.names import PackName, run_folder
from everystep.vault.pages import Pages
from everystep.vault.place import Place
from everystep.vault.reader import Reader, Sink
from everystep.vault.record import Open, Where
from everystep.vault.share import HostShare, host_share
from everystep.vault.together import together
from everystep.vault.writers import permit

Array = np.ndarray[Any, Any]


@dataclass
class Term:
    """What a writing process holds: the number and nonce of its term, and the counters behind its names."""

    number: int
    nonce: str
    writer: str
    ordinal: int = 0
    steps: dict[int, tuple[str, str]] = field(default_factory=dict)
    """step -> (content, checkpoint id) of what this term has committed."""
    packs: Iterator[int] = field(default_factory=count)

    def next_pack(self) -> int:
        """Another number each time, on whatever threads it is asked: the interpreter's own counter is safe there."""
        return next(self.packs)


class RunVault:
    """What one run has on disk. Reading never writes; only `open_term` takes the run."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name = place, name
        self.storage, self.seam, self.settings = place.storage, place.seam, place.settings
        self.folder = run_folder(name)
        self.log_in_full = False
        """Every record is read by itself, also where a volume holds it."""
        self._log: Log | None = None
        self._held: History | None = None

    @property
    def where(self) -> str:
        return f"{self.storage.url}/{self.folder}".rstrip("/")

    @property
    def author(self) -> str:
        """Who this process is, for the records that it writes."""
        process = self.seam.process()
        return f"{process.host}:{process.pid}"

    @property
    def log(self) -> Log:
        """The run's log; asking for it creates the repository."""
        if self._log is None:
            genesis = self.place.identity()

            def may(history: History, events: list[Any]) -> None:
                permit(self.place, history, events)

            self._log = Log(self.storage, self.folder, genesis, self.seam, self.settings, may, in_full=self.log_in_full)
        return self._log

    def history(self) -> History:
        """The fold of the log as it is now; an empty one where there is no repository yet."""
        if self._held is not None:
            return self._held
        return self.log.refresh() if self.place.exists else History("")

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within it, `history()` is what it was when it began: many questions, one look at the log."""
        self._held = self.history()
        try:
            yield
        finally:
            self._held = None

    def open_term(self, event: Callable[[History], Open], author: str) -> Term:
        """Takes the run: every lower term is fenced from here on."""
        taken: list[OpenTerm] = []
        self.place.prepare()
        if self.storage is not self.place.storage:  # it is known since just now that it takes care
            self.storage, self._log = self.place.storage, None

        def decide(history: History) -> list[Any]:
            # A record that cannot be read may have opened a term: stay above it.
            number = history.term + 1 + history.lost
            taken.append(OpenTerm(event(history), number))
            return [taken[-1]]

        self.log.append(decide, author)
        won = taken[-1]
        return Term(won.term, won.event.nonce, f"{self.seam.token(16)}-{won.term}")

    # reading -------------------------------------------------------------------------------------------------------

    def manifest(self, commit: Committed) -> Manifest:
        pages = self._pages()
        return read_manifest(commit.event, pages.fetch, f"{self.where} checkpoint {commit.event.id}", pages.ahead)

    def opened(self, commit: Committed) -> tuple[Manifest, History]:
        """A checkpoint's manifest, and the history as it is now; asked for at once."""
        asked: list[Callable[[], Any]] = [lambda: self.manifest(commit), self.history]
        manifest, history = together(self.storage, self.seam, lambda ask: ask(), asked)
        return manifest, history

    def read_pages(self, pages: Sequence[Where], where: str) -> bytes:
        """The plain bytes of pages, each checked against its BLAKE3."""
        return self._pages().fetch(pages, where)

    def _pages(self) -> Pages:
        return Pages(self.storage, self.folder, self.seam)

    def host_share(self) -> AbstractContextManager[HostShare | None]:
        """What processes of this host hand each other, while they read."""
        ranks = self.settings.host_ranks or self.seam.ranks_here()
        return host_share(self.storage, self.folder, self.seam, ranks)

    def read_chunks(
        self,
        view: PartView,
        indices: Sequence[int],
        pool: Pool,
        sink: Sink | None = None,
        *,
        every_link: bool = False,
        share: HostShare | None = None,
    ) -> Iterator[list[int]]:
        """Reads and verifies chunks in parallel, into the sink if there is one; the numbers of those that are done.

        Args:
            every_link: also what they lean on is held against its hash, which says nothing of these bytes.
            share: of `host_share`, for what the others of this host read, too.
        """
        reader = Reader(self.storage, self.folder)
        readers = self.settings.readers
        if not readers and self.storage.fan_out > 1:
            readers = min(self.storage.fan_out, len(indices))
        if not readers:
            yield from reader.read(view, indices, pool, sink, every_link=every_link, share=share)
            return
        with closing(self.seam.pool(readers, "everystep-fetch")) as fetchers:
            yield from reader.read(view, indices, pool, sink, every_link=every_link, fetchers=fetchers, share=share)

    def read_chunk(self, spot: Spot, nbytes: int) -> Array:
        """The plain bytes of one chunk; it and all that it leans on are verified."""
        return Reader(self.storage, self.folder).checked([(spot, nbytes)])[0]

    def read_links(self, wanted: Sequence[tuple[Spot, int]]) -> dict[tuple[PackName, int, int], memoryview]:
        """(pack, offset, length) -> what is stored there, of chunks and of all that they lean on; every link is
        verified, and read once."""
        return Reader(self.storage, self.folder).links(wanted)

    def read_stored(self, wanted: list[tuple[Spot, int]]) -> list[memoryview]:
        """Chunks as they are stored, given with their plain lengths; each is verified as what it decodes to."""
        stored: dict[int, memoryview] = {}
        Reader(self.storage, self.folder).checked(wanted, stored)
        return [stored[i] for i in range(len(wanted))]
