"""Evaluate how well keys are found."""

from __future__ import annotations

from pathlib import Path

import click

from ringmark.errors import counted
from ringmark.watermark.cli.options import (
    FIGURE,
    KEYS_HELP,
    PATH,
    Finite,
    ModelOptions,
    batch_option,
    calibration_option,
    force_option,
    guidance_option,
    json_option,
    max_steps_option,
    model_options,
    names,
    say,
    seed_option,
    size_option,
    steps_option,
    warn,
)


@click.command()
@click.argument("results", metavar="RESULTS...", type=PATH, nargs=-1, required=True)
@click.option(
    "--labels",
    type=PATH,
    multiple=True,
    required=True,
    help="CSV with the columns path and label, or JSON {path: label}; may be repeated.",
)
@click.option("-o", "--output", type=FIGURE, help="Draw the curves into this PNG or SVG.")
@click.option(
    "--fpr",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="False-positive rate at which the true-positive rate is reported.",
)
@force_option
@json_option
def roc(
    results: tuple[Path, ...], labels: tuple[Path, ...], output: Path | None, fpr: float, force: bool, as_json: bool
) -> None:
    """Compute ROC curves and AUC from audits of labelled images.

    Reports the threshold for the given false-positive rate, and the rates at that threshold with their intervals, if
    there are enough unmarked images (99 for 1 %). --json also gives all points of the curves. Records and labels that
    were left out are listed.

    \b
    Example:
      ringmark roc results.jsonl --labels marked/labels.csv --labels unmarked/labels.csv -o roc.png
    """
    from ringmark.data.files import refuse_foreign
    from ringmark.watermark.evaluation.plots import roc_figure
    from ringmark.watermark.figures import save_figure
    from ringmark.watermark.tasks.roc import roc_of_files

    if output:
        refuse_foreign(output, force)
    report = roc_of_files(results, labels, fpr)
    counts, *left_out = report.coverage()
    warn(left_out)
    click.echo(counts, err=as_json)
    say(report.record(), report.table().split("\n"), as_json)
    if output:
        save_figure(roc_figure(list(report.curves.values())), output, force=force)
        click.echo(f"curves drawn into {output}", err=as_json)


@click.command()
@click.option("-o", "--output", type=PATH, required=True, help="Folder for images, records, tables and plots.")
@click.option("--key", "key_paths", type=PATH, multiple=True, help=f"{KEYS_HELP}  [default: a new one, kept in OUTPUT]")
@click.option("--marked", type=PATH, help="Folder of images marked with the one --key.  [default: drawn]")
@click.option("--unmarked", type=PATH, help="Folder of unmarked images.  [default: drawn]")
@click.option(
    "-n",
    "--n",
    "--number",
    "number",
    type=click.IntRange(2),
    default=32,
    show_default=True,
    help="Number of images of each kind to draw.",
)
@click.option(
    "--attacks",
    multiple=True,
    callback=names,
    help="Attacks such as jpeg:25,blur:4 or tree-ring (see ringmark attack --list); may be repeated.  [default: none]",
)
@click.option(
    "--methods",
    default=("encoder,operator",),
    multiple=True,
    show_default=True,
    callback=names,
    help="Decoder inversions to compare.",
)
@seed_option
@guidance_option
@click.option(
    "--draw-steps", type=click.IntRange(1), default=25, show_default=True, help="Steps of the sampler for drawing."
)
@size_option
@max_steps_option
@steps_option
@batch_option
@calibration_option
@force_option
@model_options
@json_option
def evaluate(
    output: Path,
    key_paths: tuple[Path, ...],
    marked: Path | None,
    unmarked: Path | None,
    number: int,
    attacks: tuple[str, ...],
    methods: tuple[str, ...],
    seed: int,
    guidance: float,
    draw_steps: int,
    size: tuple[int, int] | None,
    max_steps: int | None,
    steps: int,
    batch: int,
    calibration: Path | None,
    force: bool,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Measure how well keys are found under attacks, by several decoder inversions.

    Reports AUC, true-positive rates, time, memory and cost in image quality. Marked and unmarked images are
    independent. Finished work is kept, so an interrupted run can be resumed, and a further attack, method or key only
    costs its own time. Tables (evaluation.md, .csv, .json, scores.csv) and plots cover what this run names. With
    several keys or methods, gains.csv has the paired difference of the mean AUC for each pair of them.

    \b
    Example:
      ringmark evaluate -n 200 --attacks tree-ring --methods encoder,operator -o evaluation
    """
    from ringmark.inversion.models.loading import resolve
    from ringmark.watermark.evaluation.report import summary
    from ringmark.watermark.tasks.evaluate import evaluate as carry_out
    from ringmark.watermark.tasks.plan import Plan

    plan = Plan(
        output=output,
        keys=key_paths,
        marked=marked,
        unmarked=unmarked,
        number=number,
        attacks=attacks,
        methods=methods,
        seed=seed,
        guidance=guidance,
        draw_steps=draw_steps,
        size=size,
        max_steps=max_steps,
        steps=steps,
        batch=batch,
        calibration=calibration,
        force=force,
    )
    loaded = model.load(text=not (marked and unmarked))  # to draw what is not given
    evaluation = carry_out(loaded, plan, Path(resolve(model.source)))
    if not as_json:
        warn(evaluation.refused)
    refused = counted(len(evaluation.refused), "file")
    lines = [*summary(evaluation).split("\n"), f"{refused} refused; tables and plots in {output}"]
    say(evaluation.record(), lines, as_json)
