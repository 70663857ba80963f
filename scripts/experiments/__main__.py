"""Run an experiment by name: `python -m scripts.experiments NAME -o DIR [OPTIONS]`."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import click

FOLDER = Path(__file__).parent
PLUMBING = {"__init__", "__main__", "common", "costs", "plots", "processes", "stand_in"}


def summaries() -> dict[str, str]:
    """The first line of each experiment's docstring, by name. Nothing is imported."""
    files = sorted(path for path in FOLDER.glob("*.py") if path.stem not in PLUMBING)
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0] for path in files}


class Experiments(click.Group):
    """Imports an experiment on first use."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(summaries())

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(f"scripts.experiments.{name}").main if name in summaries() else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Experiments"):
            formatter.write_dl(list(summaries().items()))


def show_list(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """Print the names with their descriptions and exit."""
    if asked:
        for name, summary in summaries().items():
            click.echo(f"{name:16} {summary}")
        context.exit()


@click.command(cls=Experiments)
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=show_list, help="List and exit.")
def main() -> None:
    """Experiments that reproduce the measurements in the documentation.

    `python -m scripts.experiments NAME --help` describes one. An interrupted run resumes from its last batch.
    """


if __name__ == "__main__":
    main(prog_name="python -m scripts.experiments")
