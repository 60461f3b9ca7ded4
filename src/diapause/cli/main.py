"""The program: global options, the verbs, and what a failure looks like.

Exit codes: 0, 2 for usage, the error class's own, 130 when interrupted, 141 when the reader of
stdout went away. With `--json` a failure is `{"error": …}` on stdout, beside the text on stderr.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

import click

from diapause import __version__
from diapause.cli.attend import Interrupted
from diapause.cli.context import Context, json_option
from diapause.cli.lazy import LazyGroup
from diapause.cli.output import error_text, json_document, say, usage_text
from diapause.daemon.start import DaemonCommand, daemon_command
from diapause.errors import DiapauseError, InvalidRequest
from diapause.store.home import Home

INTERRUPTED = 128 + signal.SIGINT
READER_GONE = 128 + signal.SIGPIPE

_VERBS = {
    name: f"diapause.cli.{module}:{name}"
    for name, module in {
        "doctor": "doctor", "image": "image", "run": "run", "ps": "ps", "inspect": "inspect",
        "logs": "logs", "exec": "exec", "rm": "rm", "pause": "pause", "resume": "resume",
        "fork": "fork", "snapshot": "snapshot", "gc": "gc", "check": "check", "df": "df",
        "serve": "serve", "freeze": "freeze",
        "thaw": "freeze", "restore": "restore",
        "completion": "completion",
        "events": "events",
        "cp": "cp", "console": "console",
        "system": "system", "pager": "pager", "bench": "bench",
    }.items()
}  # fmt: skip
_VERBS["support-bundle"] = "diapause.cli.support_bundle:support_bundle"
_VERBS["exec"] = "diapause.cli.exec:exec_"

_EXAMPLES = """\b
Examples:
  diapause image build tiny
  id=$(diapause run --memory 512M)
  diapause exec $id -- uname -a
  diapause pause $id && diapause resume $id
  diapause fork $id -n 4"""

_SETTINGS = {"max_content_width": 100}


@click.group(cls=LazyGroup, verbs=_VERBS, epilog=_EXAMPLES, context_settings=_SETTINGS)
@click.option(
    "--home",
    type=click.Path(file_okay=False),
    help="Where everything is kept. Default: $DIAPAUSE_HOME, else the user's data directory.",
)
@json_option
@click.version_option(__version__, prog_name="diapause")
@click.pass_context
def cli(context: click.Context, home: str | None) -> None:
    """Pause, snapshot, fork and resume microVMs: life stops, and goes on where it was."""
    if home is not None:
        context.find_object(Context).home = Home.at(home)  # type: ignore[union-attr]


def main(arguments: Sequence[str] | None = None, command: DaemonCommand = daemon_command) -> int:
    """Run one verb; the exit code."""
    _hold_standard_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    context = Context(Home.at(), json="--json" in _before_command(words), command=command)
    try:
        if os.environ.get("_DIAPAUSE_COMPLETE"):
            from diapause.cli.completion import answer_shell

            return answer_shell(cli, context)
        return _run(words, context)
    except BrokenPipeError:
        # Nothing more can be said there; the interpreter must not try to at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _hold_standard_streams() -> None:
    """A closed standard stream stays unusable, but its number is not given to a file of ours."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken: this one.
            os.open(os.devnull, os.O_RDONLY)


def _run(words: list[str], context: Context) -> int:
    try:
        # Not `cli.main`, which turns a reader that left into exit 1 by itself.
        with cli.make_context("diapause", words, obj=context) as made:
            code = cli.invoke(made)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        usage_text(error)
        _document(context, InvalidRequest(what="the command line", cause=error.format_message()))
        return error.exit_code
    except click.ClickException as error:
        usage_text(error)
        _document(context, DiapauseError(cause=error.format_message()))
        return error.exit_code
    except DiapauseError as error:
        error_text(error)
        _document(context, error)
        return error.exit_code
    except Interrupted as interrupted:
        say(f"diapause: {interrupted}")
        _document(context, interrupted.error)
        return INTERRUPTED
    except (KeyboardInterrupt, click.Abort):
        with contextlib.suppress(OSError):
            say("diapause: interrupted; the daemon goes on with what it began")
        return INTERRUPTED


def _document(context: Context, error: DiapauseError) -> None:
    if context.json:
        json_document({"error": error.to_dict()})


def _before_command(words: list[str]) -> list[str]:
    """The words that are ours: what follows `--` belongs to a guest's command."""
    return words[: words.index("--")] if "--" in words else words
