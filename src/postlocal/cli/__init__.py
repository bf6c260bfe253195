"""The ``postlocal`` command."""

import logging
import os
import signal
import sys
from inspect import Parameter

import typer

from postlocal.cli.plan import plan
from postlocal.cli.sample import sample
from postlocal.cli.simulate import simulate
from postlocal.cli.strategies import strategies
from postlocal.cli.train import train
from postlocal.errors import CheckpointError, DisagreementError, PostlocalError
from postlocal.strategies import NAMED, parameters_of
from postlocal.train import Interrupted
from postlocal.version import __version__

app = typer.Typer(
    help="Data-parallel PyTorch training that communicates seldom.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(sample)
app.command()(plan)
app.command()(simulate)
app.command()(strategies)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(help="Data-parallel PyTorch training that communicates seldom.")
def _common(
    show_version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Take options that come before a command."""


def main() -> None:
    """Run the command; a fault is one line on standard error, and an exit code.

    Exit codes: 0 done, 1 a rank was lost, 2 bad input, 128 and the signal's number after a signal.
    """
    logging.basicConfig(format="postlocal: %(message)s", level=logging.WARNING)
    try:
        code = app(standalone_mode=False)
    except Interrupted as interrupted:
        _say(str(interrupted), everywhere=False)
        code = 128 + interrupted.signal
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except (ValueError, DisagreementError, CheckpointError) as error:
        # All ranks raise these together; rank 0's message is complete.
        _say(f"error: {error}", everywhere=False)
        code = 2
    except PostlocalError as error:
        _say(f"error: {error}", everywhere=True)
        code = 1
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message += _instead(getattr(error, "option_name", ""))
        if message:  # where no command was given, the help has been shown
            _say(f"error: {message} (see {_command(error)} --help)", everywhere=False)
        code = 2
    sys.exit(code or 0)


def _instead(option: str) -> str:
    """How to write an argument of a strategy that is no option."""
    name = option.removeprefix("--").replace("-", "_")
    having = [each for each in NAMED if name in parameters_of(each)]
    if not having:
        return ""
    own = [each for each in having if parameters_of(each)[name].kind is not Parameter.KEYWORD_ONLY]
    example = own[0] if own else "diloco"
    return f": it is written in the strategy, as in --strategy '{example}({name}=...)'"


def _command(error: typer.TyperException) -> str:
    """The command whose help is relevant."""
    context = getattr(error, "ctx", None)
    return f"postlocal {context.info_name}" if context and context.parent else "postlocal"


def _say(text: str, everywhere: bool) -> None:
    rank = os.environ.get("RANK", "0")
    if everywhere or rank == "0":
        place = f" rank {rank}:" if everywhere and "RANK" in os.environ else ""
        print(f"postlocal:{place} {text}", file=sys.stderr)
