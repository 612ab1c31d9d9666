"""`everystep forget`, `undo` and `prune`: drop what no rule keeps, bring it back, free what nothing needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

import everystep
from everystep import Checkpoint, Conflict, Decision, Error, PastRun, Repository, Rule, UsageError
from everystep.cli import human, typed
from everystep.cli.checkpoints import SHORT_ID, when
from everystep.cli.completion import runs, targets
from everystep.cli.options import JsonOption, RepoOption, begin, instead, pick, pick_run
from everystep.cli.progress import counting
from everystep.cli.table import Column, headed, lay_out

_STYLES = {"keep": "green", "thin": "yellow", "drop": "bold red"}
_DONE = {"keep": "kept", "thin": "thinned", "drop": "dropped"}
_RULES = (
    "--keep-last 10, --keep-best 3:val_loss, --keep-every 1000, --keep-within 7d, --keep-tag 'best_*', --full-last 2"
)


def forget(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="A run and rules; or one checkpoint to drop.", metavar="RUN[@SPEC]", autocompletion=targets
        ),
    ],
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, metavar="N", help="Keep the newest N.")] = None,
    keep_best: Annotated[
        list[str] | None, typer.Option("--keep-best", metavar="N:METRIC[:MODE]", help="Keep the N best. Repeatable.")
    ] = None,
    keep_every: Annotated[
        list[str] | None,
        typer.Option("--keep-every", metavar="N", help="Keep every N steps; 6h: one in six hours. Repeatable."),
    ] = None,
    keep_within: Annotated[
        str | None, typer.Option("--keep-within", metavar="TIME", help="Keep what is at most so much older: 7d, 12h.")
    ] = None,
    keep_tag: Annotated[
        list[str] | None,
        typer.Option("--keep-tag", metavar="PATTERN", help="Keep what has such a tag in full. Repeatable."),
    ] = None,
    full_last: Annotated[
        int | None,
        typer.Option("--full-last", min=1, metavar="N", help="Thin all but the newest N: keep their weights alone."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and do nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also where more than half would go.")] = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drop checkpoints that no rule keeps, and say why.

    Rules add up: what any of them keeps, stays. The newest checkpoint and what has a tag always stay. Without a keep
    rule nothing is dropped. What is dropped or thinned can be brought back with undo for some days, and is freed by
    prune after that.
    """
    screen, repository = begin(context, repo, as_json)
    past, checkpoint = pick(repository, target)
    rules = _rules(keep_last, keep_best or [], keep_every or [], keep_within, keep_tag or [])
    full = [everystep.last(full_last), *map(everystep.tagged, keep_tag or [])] if full_last is not None else []
    _check_asked(checkpoint, [*rules, *full])
    kept = {one.id: one for one in past.checkpoints(all=True)}
    keep = _all_but(past, checkpoint) if checkpoint is not None else typed.union(rules)
    with instead(Conflict, do="--dry-run shows the plan, --force carries it out"):
        decided = past.forget(keep, typed.union(full), dry_run=dry_run, force=force)
    if checkpoint is not None:
        decided = [one for one in decided if one.checkpoint.id == checkpoint.id]
    document = {
        "repository": repository.url,
        "run": past.name,
        "dry_run": dry_run,
        "counts": {action: sum(one.action == action for one in decided) for action in _STYLES},
        "decisions": [_about(one, kept) for one in reversed(decided)],
    }
    screen.give(document, lambda: _plan(repository, document, screen.width))


def _rules(
    last: int | None, best: Sequence[str], every: Sequence[str], within: str | None, tags: Sequence[str]
) -> list[Rule]:
    return [
        *([everystep.last(last)] if last is not None else []),
        *(typed.best(text, "--keep-best") for text in best),
        *(typed.every(text, "--keep-every") for text in every),
        *([everystep.within(seconds=typed.seconds(within, "--keep-within"))] if within is not None else []),
        *map(everystep.tagged, tags),
    ]


def _check_asked(checkpoint: Checkpoint | None, rules: Sequence[Rule]) -> None:
    """
    Raises:
        UsageError: if it is not said what to keep, or said in two ways.
    """
    if checkpoint is None and not rules:
        raise UsageError("no rule says what to keep, so nothing would be dropped", do=_RULES)
    if checkpoint is not None and rules:
        raise UsageError(
            f"one checkpoint, or rules for the run {checkpoint.run!r}: not both",
            do=f"everystep forget {checkpoint.run} with the rules alone",
        )


def _all_but(past: PastRun, checkpoint: Checkpoint) -> Rule:
    """
    Raises:
        Conflict: if it stays whatever a rule says.
    """
    if checkpoint == past.latest:
        raise Conflict(
            f"step {checkpoint.step} is the newest checkpoint, which always stays",
            where=past.name,
            do=f"to go on from an earlier one: everystep rewind {past.name}@STEP",
        )
    if checkpoint.tags:
        raise Conflict(
            f"the tag {checkpoint.tags[0]!r} holds step {checkpoint.step}",
            where=past.name,
            do=f"take it away first: everystep tag {past.name} {checkpoint.tags[0]} --delete",
        )
    return everystep.when(lambda kept: kept.id != checkpoint.id)


def _about(one: Decision, kept: dict[str, Checkpoint]) -> dict[str, Any]:
    return {
        "id": one.checkpoint.id,
        "step": one.checkpoint.step,
        "time": one.checkpoint.time,
        "action": one.action,
        "reasons": list(one.reasons),
        "tags": list(one.checkpoint.tags),
        "metrics": dict(one.checkpoint.metrics),
        "raw_bytes": int(kept[one.checkpoint.id].cost["raw_bytes"]) if one.checkpoint.id in kept else None,
    }


def _plan(repository: Repository, document: dict[str, Any], width: int | None) -> Iterator[Text]:
    found = document["decisions"]
    columns = [
        Column(""), Column("step", right=True, style="bold"), Column("id", style="cyan"), Column("when"),
        Column("size", right=True, spare=True), Column("why", least=40),
    ]  # fmt: skip
    rows = [
        [
            one["action"],
            str(one["step"]),
            one["id"] if width is None else one["id"][:SHORT_ID],
            when(repository, one["time"], width),
            human.size(one["raw_bytes"]) if one["raw_bytes"] is not None else "",
            human.clean(", ".join(one["reasons"])),
        ]
        for one in found
    ]
    table = lay_out(columns, rows, width, {(at, 0): _STYLES[one["action"]] for at, one in enumerate(found)})
    if rows:
        yield table.head
        yield from table.rows
    parts = [f"{number} {_DONE[action]}" for action, number in document["counts"].items() if number]
    yield Text("\n").append(", ".join(parts) or "no checkpoint yet", "bold")
    name = human.clean(document["run"])
    if document["dry_run"]:
        yield Text("… that is the plan; nothing was done", "dim")
    elif document["counts"]["drop"] or document["counts"]["thin"]:
        yield Text(f"… everystep undo {name} takes it back", "dim")
        yield Text(f"… everystep prune {name} frees it, after some days, or with --now at once", "dim")


def undo(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="A run.", metavar="RUN", autocompletion=runs)],
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring back what was dropped or thinned last, all of it.

    Once more takes back what was dropped before that, as long as it has not been freed.
    """
    screen, repository = begin(context, repo, as_json)
    past = pick_run(repository, run)
    back = past.undo()
    left = past.dropped
    document = {
        "repository": repository.url,
        "run": past.name,
        "back": [{"id": one.id, "step": one.step, "thin": one.thin} for one in back],
        "undoable": len(left),
    }

    def lines() -> Iterator[Text]:
        steps = ", ".join(str(one.step) for one in back)
        yield headed(human.clean(past.name), f": {human.count(len(back), 'checkpoint')} back: {steps}")
        if left:
            yield Text(f"… {human.count(len(left), 'checkpoint')} more can be brought back: undo once more", "dim")

    screen.give(document, lines)


def prune(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(help="A run; without it, all runs.", metavar="RUN", autocompletion=runs)
    ] = None,
    now: Annotated[bool, typer.Option("--now", help="Also what undo could still bring back: it is gone then.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be freed, and do nothing.")] = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> int:
    """Free what no checkpoint needs any more. Safe beside a process that is saving.

    What forget dropped stays for some days, so that undo can bring it back; --now does not wait. A run whose log is
    damaged is left alone.
    """
    screen, repository = begin(context, repo, as_json)
    names = repository.runs() if run is None else [pick_run(repository, run).name]
    freed: list[dict[str, Any]] = []
    refused: list[tuple[str, Error]] = []
    with counting("pruning") as told:
        for count, name in enumerate(names, 1):
            try:
                freed.append(_prune(repository[name], now=now, dry_run=dry_run))
            except Error as error:
                if run is not None:
                    raise
                refused.append((name, error))
            if told is not None:
                told(name, count, len(names))
    document = {
        "repository": repository.url,
        "now": now,
        "dry_run": dry_run,
        "runs": freed,
        "refused": [
            {"run": name, "kind": error.kind, "what": error.what, "where": error.where, "do": error.do}
            for name, error in refused
        ],
    }
    screen.give(document, lambda: _freed(document, screen.width))
    return refused[0][1].exit_code if refused else 0


def _prune(past: PastRun, **how: bool) -> dict[str, Any]:
    steps = {checkpoint.id: checkpoint.step for checkpoint in past.dropped}
    freed = past.prune(**how)
    gone = [{"id": id, "step": steps[id]} for id in freed.checkpoints if id in steps]
    return {"run": past.name, **asdict(freed), "checkpoints": gone}


def _freed(document: dict[str, Any], width: int | None) -> Iterator[Text]:
    title = "would be freed" if document["dry_run"] else "freed"
    columns = [
        Column("run", style="bold", least=12), Column(title, right=True, style="green"),
        Column("packs", right=True, spare=True), Column("can be undone", right=True, style="yellow"),
        Column("held", right=True),
    ]  # fmt: skip
    names = ("nbytes", "pending_bytes", "held_bytes")
    found = document["runs"]
    every = [*found, {"run": "all", **{name: sum(one[name] for one in found) for name in (*names, "packs")}}]
    rows = [
        [
            human.clean(one["run"]), human.size(one["nbytes"]), str(one["packs"]), human.size(one["pending_bytes"]),
            human.size(one["held_bytes"]),
        ]
        for one in (every if len(found) > 1 else found)
    ]  # fmt: skip
    table = lay_out(columns, rows, width)
    if rows:
        yield table.head
        yield from table.rows
    elif not document["refused"]:
        yield Text("no run yet")
    yield from _what_goes(document)
    for one in document["refused"]:
        yield Text(f"{human.clean(one['run'])}: {human.clean(one['what'])}", "red")
        yield Text(f"  {human.clean(one['do'])}", "dim")


def _what_goes(document: dict[str, Any]) -> Iterator[Text]:
    """Which checkpoints undo cannot bring back any more, and what no checkpoint ever had."""
    notes = []
    for one in document["runs"]:
        if one["checkpoints"]:
            steps = human.steps(sorted(gone["step"] for gone in one["checkpoints"]))
            how = "could not be brought back any more" if document["dry_run"] else "cannot be brought back any more"
            notes.append(f"{human.clean(one['run'])}: {how}: {steps}")
        if one["left_bytes"]:
            notes.append(
                f"{human.clean(one['run'])}: {human.size(one['left_bytes'])} of saves that were never committed"
            )
    if document["dry_run"] and document["runs"]:
        notes.append("nothing was done: without --dry-run it is")
    if notes:
        yield Text("\n" + "\n".join(f"… {note}" for note in notes), "dim")
