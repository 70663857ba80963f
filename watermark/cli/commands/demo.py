"""Run the other commands one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ringmark.watermark.cli.options import EXIT_ABSENT, PATH, force_option


def plan(output: Path, number: int, force: bool) -> list[list[str]]:
    """The arguments of each command."""
    key, results = str(output / "my.key"), str(output / "results.jsonl")
    marked, unmarked = output / "images" / "marked", output / "images" / "unmarked"
    first = [str(folder / f"{seed:07d}.png") for folder, seed in ((marked, 0), (unmarked, number))]
    labels = [arg for folder in (marked, unmarked) for arg in ("--labels", str(folder / "labels.csv"))]
    again = ["--force"] if force else []
    make_key = [] if (output / "my.key").exists() else [["keygen", "-o", key]]
    return [
        *make_key,
        ["generate", "--key", key, "-n", str(number), "-o", str(marked)],
        ["generate", "--no-mark", "-n", str(number), "--seed", str(number), "-o", str(unmarked)],
        ["verify", *first, "--key", key, "--explain", str(output / "explain.png"), *again],
        ["audit", str(output / "images"), "--key", key, "-o", results],
        ["roc", results, *labels, "-o", str(output / "roc.png"), *again],
    ]


@click.command()
@click.option(
    "-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder for everything the demo makes."
)
@click.option(
    "-n", "--number", type=click.IntRange(2), default=24, show_default=True, help="Number of images of each kind."
)
@force_option
@click.pass_context
def demo(ctx: click.Context, output: Path, number: int, force: bool) -> None:
    """Run everything once on the model that ships with ringmark: key, images, verdicts, audit, ROC.

    \b
    Example:
      ringmark demo -o demo
    """
    root = ctx.find_root().command
    for args in plan(output, number, force):
        click.secho("\n$ ringmark " + " ".join(args), bold=True)
        code = root.main(args, standalone_mode=False) or 0
        if code not in (0, EXIT_ABSENT):
            sys.exit(code)
    click.echo(f"\nImages, key, records and plots are in {output}.")
