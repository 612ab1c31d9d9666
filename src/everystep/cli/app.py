"""The verbs of the command line, what is said about them, and how a call ends."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import everystep
from everystep import Error, UsageError
from everystep.cli.between import mirror, pull, push
from everystep.cli.completion import completion
from everystep.cli.diff import diff
from everystep.cli.doctor import doctor
from everystep.cli.exchange import export, import_files
from everystep.cli.fsck import fsck
from everystep.cli.log import log
from everystep.cli.rehearse import SETTINGS
from everystep.cli.repack import repack
from everystep.cli.retention import forget, prune, undo
from everystep.cli.rewind import rewind
from everystep.cli.screen import Screen
from everystep.cli.show import show
from everystep.cli.stats import stats
from everystep.cli.storage import storage
from everystep.cli.tag import note, tag
from everystep.cli.verify import verify_resume

INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class Verbs(TyperGroup):
    """The command itself: an error of ours is three lines and an exit code, never a traceback."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        given = [*(sys.argv[1:] if args is None else args)]
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # no name on disk may break the output
        screen = Screen(as_json="--json" in given)
        with screen.listening():
            code = self._call(given, screen, extra)
        sys.exit(code)

    def _call(self, given: list[str], screen: Screen, extra: dict[str, Any]) -> int:
        extra.update(prog_name="everystep", standalone_mode=False, obj=screen)
        try:
            try:
                code = super().main(given, **extra)
            except Error as error:
                screen.fail(error)
                return error.exit_code
            except Exception as error:
                message = getattr(error, "format_message", None)  # the parser's own errors, whatever typer calls them
                if message is None:
                    raise
                screen.fail(_misread(str(message()), getattr(error, "ctx", None)))
                return UsageError.exit_code
        except KeyboardInterrupt:
            return INTERRUPTED
        return code if isinstance(code, int) else 0


def _misread(message: str, context: Any) -> UsageError:
    path = context.command_path if context is not None else "everystep"
    return UsageError(message.rstrip("."), do=f"{path} --help")


app = typer.Typer(
    cls=Verbs, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"everystep {everystep.__version__} (kernel: {everystep.KERNEL})")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog="""
    RUN@SPEC names a checkpoint: resnet@1200, resnet@latest, resnet@best:val_loss, resnet@my_tag, resnet@3f9a.

    Exit codes: 0 fine, 2 usage, 3 not found, 4 damaged; docs/cli.md has them all.

    \b
    Examples:
      everystep -r runs log
      everystep -r runs log resnet -n 20
      everystep -r runs show resnet@best:val_loss
      EVERYSTEP_REPO=runs everystep fsck
    """,
)
def everystep_command(
    context: typer.Context,
    repo: Annotated[
        str | None,
        typer.Option(
            "-r",
            "--repo",
            envvar="EVERYSTEP_REPO",
            show_envvar=True,
            help="The repository: a folder or URL. Without it, the folder here.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, an error too.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version, and the kernel: C or NumPy.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Look at, check and look after the checkpoints of training runs."""
    context.obj.place = repo
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs log                     all runs
      everystep -r runs log resnet -n 20        the 20 newest checkpoints
      everystep -r runs log resnet --all        every line, as a graph
      everystep -r runs log resnet --behind s3://bucket/prefix   what is not there yet
      everystep -r runs log --best val_loss     the best of all runs
      everystep -r runs log resnet --where "val_loss < 0.3 and step > 500"
      everystep -r runs log resnet --json | jq '.checkpoints[].step'
    """
)(log)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs show resnet                  the run: config, tags, terms
      everystep -r runs show resnet@1200             the checkpoint of step 1200
      everystep -r runs show resnet@best:val_loss --all-leaves
      everystep -r runs show resnet@latest --norms   is anything not finite?
    """
)(show)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs diff resnet@1000 @1200
      everystep -r runs diff resnet@best:val_loss vit@latest --only model
      everystep -r runs diff resnet@1000 @1200 --exit-code --json
    """
)(diff)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs tag resnet@best:val_loss release
      everystep -r runs tag resnet@latest best_model --version   best_model_v1, …
      everystep -r runs tag resnet                               its tags
      everystep -r runs tag resnet release --delete
    """
)(tag)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs note resnet "the learning rate was too high"
      everystep -r runs note resnet@1200 "the plot in the paper"
      everystep -r runs note resnet                  its notes
    """
)(note)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs rewind resnet@1000
      everystep -r runs rewind resnet@best:val_loss --takeover
    """
)(rewind)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs export resnet@best:val_loss model.safetensors --only model
      everystep -r runs export resnet@1200 all.pth --overwrite
    """
)(export)
app.command(
    "import",
    epilog="""
    \b
    Examples:
      everystep -r runs import old/checkpoints --run resnet --dry-run
      everystep -r runs import model.safetensors
    """,
)(import_files)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs push s3://bucket/prefix
      everystep -r runs push /backup resnet --keep-best 3:val_loss
      everystep -r runs push /backup resnet@release --dry-run
    """
)(push)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs pull s3://bucket/prefix resnet@best:val_loss
      everystep -r runs pull s3://bucket/prefix resnet@latest --only params/head
    """
)(pull)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs mirror /backup/runs
      everystep -r /backup/runs mirror --promote
    """
)(mirror)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs forget resnet --keep-last 10 --keep-best 3:val_loss --dry-run
      everystep -r runs forget resnet --keep-every 1000 --keep-within 7d --force
      everystep -r runs forget resnet --full-last 2    thin the others, drop none
      everystep -r runs forget resnet@1200             drop that one
    """
)(forget)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs undo resnet
    """
)(undo)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs prune --dry-run         what would be freed
      everystep -r runs prune
      everystep -r runs prune resnet --now      what undo could bring back goes, too
    """
)(prune)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs repack resnet
      everystep -r runs repack resnet --dead 20%
    """
)(repack)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs stats
      everystep -r runs stats resnet --json | jq '.runs[0].ratio'
    """
)(stats)
app.command(
    epilog="""
    \b
    Examples:
      everystep -r runs fsck                    everything
      everystep -r runs fsck --read 1/10        every record, a tenth of the data
      everystep -r runs fsck resnet --no-data   one run, fast
    """
)(fsck)
app.add_typer(storage, name="storage")
app.command(
    context_settings=SETTINGS,
    epilog="""
    \b
    Examples:
      everystep verify-resume train.py --epochs 3
      everystep verify-resume --after 10 --steps 5 train.py
      everystep verify-resume --json train.py | jq .verdict
    """,
)(verify_resume)
app.command(
    context_settings=SETTINGS,
    epilog="""
    \b
    Examples:
      everystep doctor train.py --epochs 90
      everystep doctor --total-steps 100000 --save-every 500 train.py
    """,
)(doctor)
app.command(
    epilog="""
    \b
    Examples:
      eval "$(everystep completion bash)"
      everystep completion fish > ~/.config/fish/completions/everystep.fish
    """
)(completion)


def main() -> None:
    """Runs the command line and exits."""
    gc.set_threshold(200_000)  # a fold of many records is all new objects, and none of it is garbage
    app()
