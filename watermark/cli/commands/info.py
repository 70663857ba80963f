"""Recover the noise of an image, and show facts about a model."""

from __future__ import annotations

from pathlib import Path

import click

from ringmark.errors import counted
from ringmark.watermark.cli.options import (
    PATH,
    InversionOptions,
    ModelOptions,
    force_option,
    inversion_options,
    json_option,
    model_options,
    say,
)


@click.command()
@click.argument("image", type=PATH)
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="The safetensors file to write, with latents, noise and residuals. The noise of a marked image is a rough "
    "copy of the key: keep it secret.",
)
@inversion_options
@model_options
@force_option
@json_option
def invert(
    image: Path, output: Path, inversion: InversionOptions, model: ModelOptions, force: bool, as_json: bool
) -> None:
    """Recover the latents and the initial noise of an image.

    \b
    Example:
      ringmark invert picture.png -o noise.safetensors --method anderson
    """
    from ringmark.data.files import refuse_existing
    from ringmark.inversion.recover import Recoverer
    from ringmark.watermark.tasks.invert import invert_file

    refuse_existing(output, force=force)
    recoverer = Recoverer.named(model.load(), inversion.method, inversion.max_steps, inversion.steps)
    record = invert_file(recoverer, image, output)
    residual = "not computed" if record["residual"] is None else f"{record['residual']:.3g}"
    solved = f"{record['status']} after {counted(record['evaluations'], 'evaluation')}, residual {residual}"
    say(record, f"{image}: {solved}; latents and noise in {output}", as_json)


@click.command()
@model_options
@json_option
def info(model: ModelOptions, as_json: bool) -> None:
    """Show facts about a model and this installation.

    \b
    Example:
      ringmark info --model pocket
    """
    from ringmark.watermark.tasks import info as tasks

    facts = tasks.facts(model.load())
    say(facts, [f"{name:18} {value}" for name, value in facts.items()], as_json)
