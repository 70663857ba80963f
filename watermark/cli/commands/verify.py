"""Test images for keys."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ringmark.watermark.cli.options import (
    EXIT_ABSENT,
    EXIT_INCONCLUSIVE,
    EXIT_USAGE,
    FIGURE,
    PATH,
    DetectionOptions,
    InversionOptions,
    ModelOptions,
    detection_options,
    fitting_batch_option,
    force_option,
    inversion_options,
    json_option,
    model_options,
    warn,
)
from ringmark.watermark.cli.remedies import explained

UNCHECKED = "note: p-values are not checked against unmarked images, because the model's calibration does not apply"
EXIT_CODES = {True: 0, False: EXIT_ABSENT, None: EXIT_INCONCLUSIVE}


@click.command()
@click.argument("images", metavar="IMAGE...", type=PATH, nargs=-1, required=True)
@detection_options
@inversion_options
@fitting_batch_option
@click.option(
    "--explain",
    type=FIGURE,
    help="Draw the evidence for the verdict on the first image into this PNG or SVG. It shows the key: keep it secret.",
)
@force_option
@model_options
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    images: tuple[Path, ...],
    detection: DetectionOptions,
    inversion: InversionOptions,
    batch: int | None,
    explain: Path | None,
    force: bool,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Tell whether images carry a key.

    Prints a line for each image as soon as it is decided. Exit code 0: all of them carry a key; 1: some do not; 2:
    usage error, or a file cannot be read; 3: inconclusive.

    \b
    Example:
      ringmark verify picture.png --key my.key --explain why.png
    """
    from ringmark.data.files import refuse_existing, refuse_foreign
    from ringmark.watermark.tasks.verify import explain_outcome, verify_files

    if explain and explain.resolve() in {path.resolve() for path in images}:
        refuse_existing(explain)
    elif explain:
        refuse_foreign(explain, force)
    verifier, unchecked = detection.prepare(model, inversion)
    codes: set[int] = set()
    records, first = [], None
    for outcome in verify_files(verifier, list(images), batch=batch):
        # Only the one to explain is kept, because each holds its image and noise: megabytes.
        if explain and outcome.judged and not first:
            first = outcome
        codes.add(EXIT_USAGE if outcome.error else EXIT_CODES[outcome.present])
        if as_json:
            records.append(outcome.record())
        else:
            click.echo(explained(outcome.error) if outcome.error else outcome.sentence(), err=bool(outcome.error))
    if as_json:
        click.echo(json.dumps(records, indent=1))
    elif unchecked and EXIT_CODES[True] in codes:
        warn([f"{UNCHECKED} ({unchecked})"])
    if explain and first:
        explain_outcome(verifier, first, explain, force=force)
        click.echo(f"explanation drawn into {explain}; it shows the key, keep it secret", err=True)
    ctx.exit(max(codes, key=[0, EXIT_ABSENT, EXIT_INCONCLUSIVE, EXIT_USAGE].index))
