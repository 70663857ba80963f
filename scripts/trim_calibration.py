"""Cut a calibration to the size that a model's folder has room for: the last stage, and the low rings.

ringmark calibrate build/calibration-flow --model pocket_flow -o build/pocket_flow.safetensors
python -m scripts.trim_calibration build/pocket_flow.safetensors data/pocket_flow/calibration.safetensors --reach 10
"""

from __future__ import annotations

from pathlib import Path

import click

from ringmark.watermark.calibration import Calibration


@click.command()
@click.argument("made", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--reach", type=int, required=True, help="The last ring to keep.")
def main(made: Path, output: Path, reach: int) -> None:
    """Write the calibration MADE to OUTPUT, without early stages and rings beyond --reach."""
    trimmed = Calibration.load(made).trimmed(reach)
    trimmed.save(output)
    click.echo(f"calibration {trimmed.fingerprint}: {trimmed.n} images, rings up to {trimmed.reach}")


if __name__ == "__main__":
    main()
