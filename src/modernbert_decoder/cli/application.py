"""`mbd` itself: finds the command, and gives every way to end an exit code and a plain message.

Exit codes: 0 success; 1 a defect of this package (with its traceback); 2 a mistake of the user's; 3 a job on
many texts is done, but some of them could not be used; 130 Ctrl-C; 141 the reader of our output is gone. It
knows nothing of models: a command's file is imported when it runs.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Final, TextIO

import click

from modernbert_decoder import __version__
from modernbert_decoder.cli.output import OutputError, write
from modernbert_decoder.errors import UserError

# Each is a module beside this one that defines `command`.
COMMANDS: Final = (
    "generate",
    "run",
    "serve",
    "classify",
    "score",
    "embed",
    "rank",
    "info",
    "quantize",
    "convert",
    "merge",
    "eval",
    "train",
    "cache",
    "bench",
)

EXIT_USER_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 128 + 2  # what a shell reports for a process that SIGINT ended
EXIT_CLOSED_PIPE: Final = 128 + 13  # and SIGPIPE


class LazyGroup(click.Group):
    """A group whose commands are modules, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of `--help`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"modernbert_decoder.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="mbd", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, envvar="MBD_DEBUG", help="Show tracebacks of errors (or MBD_DEBUG=1).")
@click.pass_context
def mbd(context: click.Context, debug: bool) -> None:
    """Run ModernBERT decoder language models on the CPU.

    MODEL is `storyteller` (comes with the package), a folder in Hugging Face format, or an id on the Hub such
    as jhu-clsp/ettin-decoder-17m.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `mbd` with these arguments, by default those of the process, and returns its exit code."""
    _tolerate_narrow_encodings()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments)
            write("")  # what libraries printed
        except BrokenPipeError:
            _discard_further_output()
            return EXIT_CLOSED_PIPE
        except OutputError as error:
            _discard_further_output()
            return _report(str(error))
        except BaseException as error:
            if _stems_from_interrupt(error):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C finds us on our way out
                return EXIT_INTERRUPTED
            if not isinstance(error, OSError) or not _stems_from_echo(error):
                raise
            _discard_further_output()
            return _report(f"cannot write to standard output: {error.strerror}")
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        with mbd.make_context("mbd", list(arguments)) as context:
            try:
                mbd.invoke(context)
            except OutputError:
                raise
            except UserError as error:
                if context.params["debug"]:
                    traceback.print_exc()
                return _report(error.on_command_line())
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        hint = f"\nTry `{where.command_path} --help`." if where else ""
        return _report(error.format_message() + hint)
    return 0


def _report(message: str) -> int:
    click.echo(f"mbd: error: {message}", err=True)
    return EXIT_USER_ERROR


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Replaces `warnings.showwarning`: the message on one line, without the place in our sources."""
    click.echo(f"mbd: warning: {' '.join(str(message).split())}", err=True)


def _tolerate_narrow_encodings() -> None:
    """Characters that the terminal's encoding lacks become `?` instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not when closed, or replaced by a test
            stream.reconfigure(errors="replace")


def _discard_further_output() -> None:
    """Sends what is still buffered nowhere, or Python would complain about it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and _is_broken(stream):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_broken(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        return True
    return False


def _stems_from_echo(error: OSError) -> bool:
    """Whether this is the failure of click itself to write: help, version."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code is click.echo.__code__ for frame in frames)


def _stems_from_interrupt(error: BaseException) -> bool:
    """Whether this is Ctrl-C, or the failure of a clean-up that Ctrl-C set off."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__context__
    return False
