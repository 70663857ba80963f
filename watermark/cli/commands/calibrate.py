"""Calibrate on unmarked images."""

from __future__ import annotations

from pathlib import Path

import click

from ringmark.watermark.cli.options import (
    FIGURE,
    PATH,
    InversionOptions,
    ModelOptions,
    Size,
    batch_option,
    force_option,
    inversion_options,
    json_option,
    model_options,
    say,
    warn,
)


@click.command()
@click.argument("folders", metavar="FOLDER...", type=PATH, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="The calibration file to write. Unfinished work is kept in the folder OUTPUT.unfinished: run the same command "
    "to resume, or delete the folder.",
)
@click.option("--size", type=Size(), metavar="WxH", help="Size to which images are fitted.  [default: the native size]")
@click.option("--plot", type=FIGURE, help="Draw how well noise is recovered, by ring, into this PNG or SVG.")
@inversion_options
@batch_option
@force_option
@model_options
@json_option
def calibrate(
    folders: tuple[Path, ...],
    output: Path,
    size: tuple[int, int] | None,
    plot: Path | None,
    inversion: InversionOptions,
    batch: int,
    force: bool,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Measure what recovered noise looks like in unmarked images, so that p-values hold for images like them.

    A calibration holds for one model and one decoder inversion: verify and audit with the same options. If 32 or more
    of the images were drawn by this model (generate --no-mark), keygen can also read from it where to put a mark. Exit
    code 0: written, even if some images were left out; 2: usage error or too few images; 130: interrupted.

    \b
    Example:
      ringmark calibrate unmarked photographs -o my-calibration.safetensors
    """
    from ringmark.data.files import refuse_existing, refuse_foreign
    from ringmark.inversion.recover import Recoverer
    from ringmark.watermark.tasks import calibrate as tasks

    refuse_existing(output, force=force)
    if plot:
        refuse_foreign(plot, force)
    images = tasks.Unmarked.of(folders)
    recoverer = Recoverer.named(model.load(), inversion.method, inversion.max_steps, inversion.steps)
    calibrated = tasks.calibrate(recoverer, images, output, size=size, batch=batch)
    if not as_json:
        warn(calibrated.errors)
    say(calibrated.record(), calibrated.sentence(), as_json)
    recovery = calibrated.calibration.recovery
    if plot and recovery:
        from ringmark.watermark.figures import recovery_figure, save_figure

        save_figure(recovery_figure(recovery), plot, force=force)
    elif plot:
        warn([f"{plot}: not drawn; this needs {tasks.KNOWN} images drawn by this model"])
