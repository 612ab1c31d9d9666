"""`everystep completion`: the script that a shell loads, and what it is told when somebody presses Tab."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]

import everystep
from everystep import Error, PastRun, Repository
from everystep.cli.screen import Screen

STEPS_OFFERED = 50
VARIABLE = "_EVERYSTEP_COMPLETE"
# Bash cuts words at @ and at :, so RUN@best:METRIC comes in pieces: the whole word is taken from the line. The answer
# takes the place of its end alone, which is $2, so what stands before that is taken off.
_BASH = """
_everystep_completion() {
    local IFS=$'\\n' line=${COMP_LINE:0:COMP_POINT} whole words
    whole=${line##*[[:space:]]}
    words=$(wc -w <<< "${line}x")
    COMPREPLY=( $(COMP_WORDS="$line" COMP_CWORD=$((words - 1)) %(variable)s=complete_bash $1) )
    COMPREPLY=( "${COMPREPLY[@]#"${whole%%"$2"}"}" )
}

complete -o default -F _everystep_completion everystep
"""


class Shell(StrEnum):
    """Those that a script is made for."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(help="Which one.", metavar="bash|zsh|fish")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, an error too.")] = False,
) -> None:
    """Print the script that makes a shell complete what is typed.

    It completes verbs, options, runs, tags, steps and metrics.

    For one session: bash: eval "$(everystep completion bash)"; zsh: eval "$(everystep completion zsh)", after compinit;
    fish: everystep completion fish | source. For all sessions, put that line into ~/.bashrc, ~/.zshrc or
    ~/.config/fish/config.fish. Which repository: -r if it is typed already, EVERYSTEP_REPO, or the folder here.
    """
    screen: Screen = context.obj
    screen.as_json = screen.as_json or as_json
    if shell is Shell.bash:
        script = _BASH.strip() % {"variable": VARIABLE}
    else:
        script = get_completion_script(prog_name="everystep", complete_var=VARIABLE, shell=shell.value)
    screen.give({"shell": shell.value, "script": script}, lambda: [Text(script)])


completion_init()  # typer knows the shells' ways of asking and being answered from here on


def runs(context: typer.Context, incomplete: str) -> list[str]:
    """RUN."""
    return _ask(context, lambda repository: repository.runs())


def targets(context: typer.Context, incomplete: str) -> list[str]:
    """RUN or RUN@SPEC."""
    return _ask(context, lambda repository: [*repository.runs(), *_specs(repository, context, incomplete)])


def checkpoints(context: typer.Context, incomplete: str) -> list[str]:
    """RUN@SPEC, or behind another one @SPEC of the same run."""
    return _ask(
        context,
        lambda repository: _specs(repository, context, incomplete) or [f"{name}@" for name in repository.runs()],
    )


def metrics(context: typer.Context, incomplete: str) -> list[str]:
    """METRIC, of all runs: behind an option that waits for its value, the run is not known yet."""
    return sorted(
        set(_ask(context, lambda repository: [name for run in repository for name in repository[run].metric_names]))
    )


def tags(context: typer.Context, incomplete: str) -> list[str]:
    """Tags of the run that is typed already."""
    target = str(context.params.get("target") or "")
    return _ask(context, lambda repository: list(_run_of(repository, target).tags))


def _ask(context: typer.Context, question: Callable[[Repository], list[str]]) -> list[str]:
    """The answer; none where there is no repository, or it cannot be read: Tab is no place for an error."""
    given: list[Any] = [around.params.get("repo") for around in (context, context.parent) if around is not None]
    try:
        repository = everystep.open(next((place for place in given if place), "."))
        found = question(repository) if repository.exists else []
        return [word for word in found if word.isprintable()]  # others cannot be typed, and could move the cursor
    except Error:
        return []


def _specs(repository: Repository, context: typer.Context, incomplete: str) -> list[str]:
    """RUN@SPEC for the run that is typed already, or of which only one can be meant."""
    name, at, _ = incomplete.rpartition("@")
    if not at:
        meant = [run for run in repository.runs() if run.startswith(incomplete)]
        return _of(repository[meant[0]], f"{meant[0]}@") if len(meant) == 1 else []
    if not name:
        return _of(_run_of(repository, str(context.params.get("before") or "")), "@")
    return _of(repository[name], f"{name}@")


def _run_of(repository: Repository, target: str) -> PastRun:
    return repository[target if target in repository else target.rpartition("@")[0]]


def _of(past: PastRun, lead: str) -> list[str]:
    kept = past.checkpoints(all=True)
    measured = dict.fromkeys(metric for checkpoint in kept for metric in checkpoint.metrics)
    steps = dict.fromkeys(str(checkpoint.step) for checkpoint in kept[: -STEPS_OFFERED - 1 : -1])
    return [f"{lead}{spec}" for spec in ("latest", *(f"best:{metric}" for metric in measured), *past.tags, *steps)]
