"""What the name of a file or folder says: step, epoch, metrics, which piece of a checkpoint it is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from everystep.exchange.meanings import COUNTS_MAX, DELTA_KEYS, INITIAL, METRICS, PIECES
from everystep.formats import FORMATS

LABELLED, PLAIN, WEAK = 3, 2, 1
"""How sure a number is: a word says what it is; it stands behind "checkpoint" or alone; it ends some other name."""
NUMBER = "name: number"
_SUFFIXES = tuple(ending for form in FORMATS.values() for ending in form.EXTENSIONS)
_GAP = r"[-_. \0\1]*"
_OWN_WORD = r"(?<![A-Za-z])"
_PAIR = re.compile(r"([A-Za-z][\w./@]*)=([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|nan|[-+]?inf)(?![A-Za-z0-9])", re.I)
_EPOCHS = "epochs?|ep"
_STEPS = "(?:global|train|total)?[-_ ]?steps?|iterations?|iters?|itr|it|(?:num[-_ ]?)?updates?"
_EPOCH = re.compile(rf"{_OWN_WORD}(?:{_EPOCHS})[-_. =]*(\d{{1,15}})(?!\d)", re.I)
_EPOCH_BEHIND = re.compile(rf"(?<![\d.])(\d{{1,15}})[-_ ]?(?:{_EPOCHS})(?![A-Za-z])", re.I)
_STEP = re.compile(rf"{_OWN_WORD}(?:{_STEPS})[-_. =]*(\d{{1,15}})([km]?)(?![A-Za-z\d])", re.I)
_STEP_BEHIND = re.compile(rf"(?<![\d.])(\d{{1,15}})([km]?)[-_ ]?(?:{_STEPS})(?![A-Za-z])", re.I)
_METRIC = re.compile(
    rf"{_OWN_WORD}((?:(?:val|valid|validation|test|train|eval|dev|best|avg|mean)[-_ ]?)*(?:{'|'.join(METRICS)})"
    r"(?:@?\d)?)(?:[_: ]{1,3}|-|(?=\d+\.\d))(-?\d+(?:\.\d+)?)(?!\d)",
    re.I,
)
_SHARD = re.compile(r"[-_. ]?(?:(\d{5})-of-(\d{5})|(?:part|shard)[-_ ]?(\d{1,5})[-_ ]?of[-_ ]?(\d{1,5}))(?!\d)", re.I)
_RANK = re.compile(rf"{_OWN_WORD}(?:rank|gpu|worker|proc)[-_ ]?(\d+)", re.I)
_DATE = re.compile(
    r"(?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
    r"(?:[-_T. ]*\d\d([-_:.h]?)\d\d(?:\2\d\d)?)?(?!\d)|(?<!\d)1[4-9]\d{8}(?:\d{3})?(?!\d)"
)
"""A date, with or without the time of day; or seconds or milliseconds since 1970."""
_OTHER = re.compile(
    rf"{_OWN_WORD}(?:of|version|ver|v|fold|seed|trial|exp|run|stage|layers?|patch|dim|size|img|bs|batch|lr|wd|k|res"
    r"|width|depth|heads?|gpus?|job|id|pid|attempt|copy|top|rank|gamma|alpha|beta|dropout|hidden|classes)"
    r"[-_ ]?\d+(?:\.\d+)?(?:e-?\d+)?(?![A-Za-z])",
    re.I,
)
_NOT_METRICS = ("seed", "fold", "version", "v", "trial", "exp", "run", "stage", "bs", "size", "dim", "rank", "k")
_BARE = re.compile(r"(?<!\d)(?<!\d\.)\d+(?!\d)(?!\.\d)(?![A-Za-z])")
_HOLDER = re.compile(
    r"(?:^|[^A-Za-z])(?:checkpoints?|ckpt|chkpt|ckp|chkp|cp|models?|weights?|saved?|snapshots?|snap|params|net|network"
    rf"|state|dict|policy|agent|backup|dump){_GAP}$",
    re.I,
)


_CONVENTIONS: tuple[tuple[tuple[str, ...], re.Pattern[str], tuple[str, ...]], ...] = (
    ((".keras", ".h5", ".hdf5"), re.compile(r"(?<!\d)(?<!\d\.)(\d{1,15})[-_](-?\d+\.\d+)$"), ("epoch", "val_loss")),
    ((".params",), re.compile(r"epoch(\d{1,15})batch(\d{1,15})$"), ("epoch", "step")),
    ((".params",), re.compile(r"[-_](\d{4,15})$"), ("epoch",)),
)
"""Keras: {epoch:02d}-{val_loss:.2f}, where the value is what it monitors, of itself val_loss. MXNet: its estimator, and
save_checkpoint(prefix, epoch)."""


@dataclass(frozen=True)
class Named:
    """What a name says. `label` is the name without its numbers: two files of one label are of one kind."""

    step: int | None = None
    epoch: int | None = None
    how: str = ""
    sure: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    label: str = ""
    numbered: str = ""
    """The label with the numbers that no word explains."""
    delta: bool = False
    initial: bool = False
    shard: tuple[int, int] | None = None
    rank: str = ""

    @property
    def words(self) -> list[str]:
        return _words(self.label)

    @property
    def piece(self) -> str:
        """The entry of a state that such a file becomes beside others; empty for a whole one."""
        return next((PIECES[word] or self.label for word in self.words if word in PIECES), "")

    def without_weak(self) -> Named:
        """Where nothing speaks for a number at the end of some name."""
        return replace(self, step=None, how="", sure=0, label=self.numbered) if self.sure == WEAK else self

    def within(self, folder: Named) -> Named:
        """With what the folder's name says, as far as the file's own says it less surely."""
        own = replace(
            self, delta=(self.delta or folder.delta) and not self.initial, metrics={**folder.metrics, **self.metrics}
        )
        if folder.sure < PLAIN or folder.sure <= self.sure:
            return own
        label = self.label if self.sure == LABELLED else self.numbered
        how = f"{folder.how} of its folder" if folder.how else ""
        return replace(own, step=folder.step, epoch=folder.epoch, how=how, sure=folder.sure, label=label)


def stem_of(name: str) -> str:
    """A file's name without the endings that say its format."""
    known = next((ending for ending in _SUFFIXES if name.lower().endswith(ending)), "")
    if known and len(name) > len(known):
        return stem_of(name[: -len(known)])
    return re.sub(r"\.[A-Za-z][A-Za-z0-9]{0,11}$", "", name)


def parse_file(name: str) -> Named:
    """What the name of a file says, in the conventions of the program whose format it is."""
    stem = stem_of(name)
    for endings, pattern, groups in _CONVENTIONS:
        found = pattern.search(stem) if name.lower().endswith(endings) else None
        if found is None:
            continue
        before = parse(stem[: found.start()])
        if before.step is None and before.epoch is None:
            numbers = dict(zip(groups, found.groups()))
            step, value = numbers.get("step"), numbers.get("val_loss")
            metrics = {} if value is None else {"val_loss": float(value)}
            return replace(
                before, epoch=int(numbers["epoch"]), step=None if step is None else int(step), sure=LABELLED,
                how="name: step" if step else "", metrics={**before.metrics, **metrics}, initial=False,
            )  # fmt: skip
    return parse(stem)


def parse(stem: str) -> Named:
    """What a name without its ending says; what cannot be told stays None."""
    text = _Text(stem)
    counts, metrics = _pairs(text)
    shard = text.take(_SHARD)
    ranks = [] if "lora" in stem.lower() else text.take(_RANK)
    metrics |= {re.sub("[-_ ]+", "_", match[1]): float(match[2]) for match in text.take(_METRIC)}
    for name, patterns in (("epoch", (_EPOCH, _EPOCH_BEHIND)), ("step", (_STEP, _STEP_BEHIND))):
        found = next((match for pattern in patterns if name not in counts for match in text.take(pattern)[-1:]), None)
        if found is not None:
            unit = {"k": 1000, "m": 1_000_000}.get(found[2].lower(), 1) if name == "step" else 1
            counts[name] = int(found[1]) * unit, found.end()
    text.take(_DATE)
    numbered = text.label()
    step, epoch, how, sure = _bare(text, counts)
    unknown = step is None and epoch is None
    return Named(
        step, epoch, how, sure, metrics, text.label(), numbered,
        delta=any(word in DELTA_KEYS for word in _words(stem)),
        initial=unknown and any(word in INITIAL for word in _words(stem)),
        shard=next(((int(match[1] or match[3]), int(match[2] or match[4])) for match in shard), None),
        rank="-".join(match[1] for match in ranks),
    )  # fmt: skip


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", text.lower()) if word]


class _Text:
    """A name, from which parts are taken one after the other; positions stay."""

    def __init__(self, text: str) -> None:
        self.text = text

    def take(self, pattern: re.Pattern[str]) -> list[re.Match[str]]:
        found = list(pattern.finditer(self.text))
        for match in found:
            self.cut(*match.span())
        return found

    def cut(self, start: int, end: int) -> None:
        self.text = self.text[:start] + "\0" * (end - start) + self.text[end:]

    def label(self) -> str:
        return "_".join(part for part in re.split(r"[-_. \0]+", self.text) if part)


_Counts = dict[str, tuple[int, int]]
"""What a word says: "epoch" or "step" -> (number, where it ends)."""


def _pairs(text: _Text) -> tuple[_Counts, dict[str, float]]:
    """What stands as key=number."""
    counts: _Counts = {}
    metrics: dict[str, float] = {}
    for match in text.take(_PAIR):
        word = (_words(match[1]) or [""])[-1]
        whole = match[2].isdecimal() and len(match[2]) <= COUNTS_MAX
        if whole and re.fullmatch(_EPOCHS, word):
            counts["epoch"] = int(match[2]), match.end()
        elif whole and re.fullmatch(_STEPS, word):
            counts["step"] = int(match[2]), match.end()
        elif word not in _NOT_METRICS:
            metrics[match[1]] = float(match[2])
    return counts, metrics


def _bare(text: _Text, counts: _Counts) -> tuple[int | None, int | None, str, int]:
    """(step, epoch, how, sure), numbers that no word explains taken in."""
    if "step" in counts:
        return counts["step"][0], counts["epoch"][0] if "epoch" in counts else None, "name: step", LABELLED
    epoch, behind = counts.get("epoch", (None, 0))
    numbers, sure = _numbers(text.text)
    if "epoch" in counts:
        numbers = [match for match in numbers if match.start() >= behind]
    if not numbers or {"rng", "random"} & set(_words(text.text)):
        return None, epoch, "", LABELLED if "epoch" in counts else 0
    for match in numbers:
        text.cut(*match.span())
    step = int(numbers[-1][0])
    if "epoch" in counts:
        return step, epoch, "name: step", LABELLED
    if len(numbers) == 2 and sure == PLAIN:
        return step, int(numbers[0][0]), "name: epoch_step", PLAIN
    return step, None, NUMBER, sure


def _numbers(text: str) -> tuple[list[re.Match[str]], int]:
    """The numbers that end a name, or the one that begins it; and how sure it is that they count something."""
    text = _OTHER.sub(lambda match: "\1" * len(match[0]), text)
    all_numbers = [match for match in _BARE.finditer(text) if len(match[0]) <= COUNTS_MAX]
    found: list[re.Match[str]] = []
    end = len(text)
    for match in reversed(all_numbers):
        before = text[: match.start()]
        if not re.fullmatch(_GAP, text[match.end() : end]) or (before[-1:].isalpha() and not _HOLDER.search(before)):
            break
        found.insert(0, match)
        end = match.start()
    if found:
        return found, PLAIN if re.fullmatch(_GAP, text[:end]) or _HOLDER.search(text[:end]) else WEAK
    first = [match for match in all_numbers[:1] if re.fullmatch(_GAP, text[: match.start()])]
    return first, WEAK
