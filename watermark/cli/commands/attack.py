"""Distort images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ringmark.errors import counted
from ringmark.watermark.cli.options import (
    EXIT_USAGE,
    PATH,
    SEED,
    ModelOptions,
    force_option,
    json_option,
    model_options,
    say,
    warn,
)


def list_attacks(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print all attacks and exit."""
    if value and not ctx.resilient_parsing:
        from ringmark.watermark.attacks.chains import listing

        click.echo(listing())
        ctx.exit()


@click.command()
@click.argument("images", metavar="IN", type=PATH)
@click.argument("output", metavar="OUT", type=PATH)
@click.option(
    "--attack",
    "specs",
    multiple=True,
    required=True,
    help="An attack such as jpeg:25, a chain such as jpeg:25+blur:4, or a preset such as tree-ring; may be repeated.",
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=list_attacks,
    help="List attacks and presets with their parameters and exit.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of random attacks. Each image has its own, derived from this one and its path below IN.",
)
@force_option
@model_options
@json_option
@click.pass_context
def attack(
    ctx: click.Context,
    images: Path,
    output: Path,
    specs: tuple[str, ...],
    seed: int,
    force: bool,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Distort an image, or all images of a folder, to test how robust a mark is.

    Writes PNG; each of several attacks has its own folder in OUT. Images made earlier from the same source by the same
    attack are kept. Only the attacks named vae and diffuse load a model. Exit code 0: all images are written; 2: usage
    error, or some images could not be attacked; 130: interrupted.

    \b
    Example:
      ringmark attack marked attacked --attack jpeg:25+blur:4 --attack tree-ring
    """
    from ringmark.watermark.attacks.chains import expand
    from ringmark.watermark.tasks.attack import attack_files

    chains = expand(specs)
    needed = model.load() if any(chain.needs_model for chain in chains) else None
    result = attack_files(images, output, chains, seed=seed, model=needed, force=force)
    if not as_json:
        warn(result.errors)
    text = f"{counted(result.written, 'attacked image')} written, {result.kept} kept from earlier runs; in {output}"
    say(asdict(result), text, as_json)
    ctx.exit(EXIT_USAGE if result.errors else 0)
