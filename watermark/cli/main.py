"""The group of commands and its error handling. Heavy imports are deferred until a command runs."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ringmark.errors import MarkWarning, RingmarkError
from ringmark.watermark.cli.commands.attack import attack
from ringmark.watermark.cli.commands.audit import audit, reaudit
from ringmark.watermark.cli.commands.calibrate import calibrate
from ringmark.watermark.cli.commands.demo import demo
from ringmark.watermark.cli.commands.draw import generate, noise
from ringmark.watermark.cli.commands.evaluate import evaluate, roc
from ringmark.watermark.cli.commands.info import info, invert
from ringmark.watermark.cli.commands.keys import keygen, keys
from ringmark.watermark.cli.commands.report import report
from ringmark.watermark.cli.commands.serve import serve, token
from ringmark.watermark.cli.commands.verify import verify
from ringmark.watermark.cli.options import EXIT_INTERRUPTED, EXIT_PIPE, EXIT_USAGE, warn
from ringmark.watermark.cli.remedies import explained, explained_system_error

RESUMED = ("generate", "audit", "reaudit", "calibrate", "evaluate", "attack", "demo")


class Refusal(click.ClickException):
    """An expected error, printed as one line."""

    exit_code = EXIT_USAGE


class Ringmark(click.Group):
    """Turns errors into exit code 2, expected ones into one line on stderr. Exit code 1 is reserved for verdicts."""

    def main(self, *args: Any, **extra: Any) -> Any:
        with _closed_pipe():
            return super().main(*args, **extra)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _closed_pipe():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _closed_pipe(), _plain_warnings():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as stop:
                _interrupted(ctx, str(stop))
            except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
                raise
            except Exception as error:
                _refused(ctx, error)


@contextmanager
def _closed_pipe() -> Iterator[None]:
    """Exits quietly if the reader of a pipe has closed it. Click itself would exit with 1, which is a verdict."""
    try:
        yield
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # discard what is still buffered; otherwise Python would complain at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(EXIT_PIPE)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints our warnings on stderr, each once and without the line of code that gave it; others as usual."""
    shown = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", MarkWarning)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, MarkWarning):
                usual(message, category, *where, **more)
            elif str(message) not in shown:
                shown.add(str(message))
                warn([f"Warning: {message}"])

        warnings.showwarning = show
        yield


def _interrupted(ctx: click.Context, progress: str) -> NoReturn:
    if not progress and ctx.invoked_subcommand in RESUMED:
        progress = "finished work is kept; run the same command again to resume"
    click.echo(f"interrupted: {progress}" if progress else "interrupted", err=True)
    ctx.exit(EXIT_INTERRUPTED)


def _refused(ctx: click.Context, error: Exception) -> NoReturn:
    """Print an expected error as one line, any other with its traceback."""
    if isinstance(error, RingmarkError):
        message = explained(error)
    elif isinstance(error, OSError) and error.strerror:
        message = explained_system_error(error)
    else:
        traceback.print_exc()
        ctx.exit(EXIT_USAGE)
    raise Refusal(message) from error


def _log_to_stderr(ctx: click.Context, level: int) -> None:
    """Print the library's log on stderr until the command ends."""
    logger, handler = logging.getLogger("ringmark"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
    ctx.call_on_close(lambda: logger.removeHandler(handler))


@click.group(cls=Ringmark, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ringmark")
@click.option("-v", "--verbose", count=True, help="Log progress to stderr, with times; -vv logs details too.")
@click.pass_context
def main(ctx: click.Context, verbose: int) -> None:
    """Tell whether an image carries the watermark of your latent diffusion model.

    A key is embedded in the initial noise of each image and detected by recovering that noise.

    \b
    Example:
      ringmark keygen -o my.key
      ringmark generate --key my.key -n 4 -o marked
      ringmark verify marked/*.png --key my.key
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the encoding lacks is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if verbose:
        _log_to_stderr(ctx, logging.INFO if verbose == 1 else logging.DEBUG)


COMMANDS = (keygen, keys, generate, noise, calibrate, verify, audit, reaudit, report, serve, token)
MORE = (roc, evaluate, attack, invert, demo, info)
for command in (*COMMANDS, *MORE):
    main.add_command(command)


if __name__ == "__main__":
    main()
