"""Test all images of a source for keys, and the noise that was kept of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringmark.errors import counted
from ringmark.watermark.cli.commands.verify import UNCHECKED
from ringmark.watermark.cli.options import (
    PATH,
    DetectionOptions,
    EngineOptions,
    InversionOptions,
    ModelOptions,
    alpha_option,
    detection_options,
    engine_options,
    inversion_options,
    json_option,
    keys_option,
    links_option,
    model_options,
    say,
    uncollected,
    warn,
)

if TYPE_CHECKING:
    from ringmark.watermark.tasks.audit import Audit


def skipped(files: dict[str, int]) -> str:
    """'3 other files skipped (2 .heic, 1 without suffix); ', or nothing where there are none."""
    if not files:
        return ""
    kinds = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in sorted(files.items()))
    return f"{counted(sum(files.values()), 'other file')} skipped ({kinds}); "


output_option = click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="Results, with a record for each image: a file of JSON lines, or for Parquet a folder or a name that ends in "
    ".parquet. An interrupted audit resumes from them.",
)


@click.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@output_option
@detection_options
@inversion_options
@links_option
@engine_options
@click.option(
    "--keep-noise",
    is_flag=True,
    help="Also keep the low frequencies of recovered noise next to the results, so that ringmark reaudit can test the "
    "images for other keys. They are rough copies of the images: keep them as private.",
)
@model_options
@json_option
def audit(
    sources: tuple[str, ...],
    output: Path,
    detection: DetectionOptions,
    inversion: InversionOptions,
    follow_links: bool,
    engine: EngineOptions,
    keep_noise: bool,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Look for keys in every image of one or several sources.

    A SOURCE is a folder, which is searched recursively; a bucket or a prefix in it (s3://bucket/2026, gs://, hf://); a
    .tar or .zip archive; a .parquet or .arrow table with an image column; a .csv, .txt or .parquet list of paths; an
    image (https://…); or a quoted pattern that matches such. Equal images are tested once. Files whose size or time has
    changed are tested again; addresses in a list are not. Exit code 0: every image has a record, whatever its verdict;
    2: usage error, or a source that cannot be reached; 130: interrupted.

    \b
    Example:
      ringmark audit pictures --key my.key --key old.key -o results.jsonl
      ringmark audit 's3://bucket/shards/*.tar' --key my.key -o results.parquet
      ringmark audit s3://bucket/2026 --key my.key -o results.parquet --engine ray --ray-address auto
    """
    from ringmark.watermark.tasks.audit import audit_pictures, find_pictures

    cluster = engine.cluster(model.device)
    pictures = find_pictures(sources, follow_links=follow_links)
    with uncollected():
        load = detection.loader(model, inversion)
        verifier, unchecked = load()
    counts = audit_pictures(
        verifier,
        pictures,
        output,
        batch=engine.batch,
        workers=engine.workers,
        keep_noise=keep_noise,
        cluster=cluster,
        load=load,
    )
    if not as_json:
        _warn_of_errors(counts)
        if counts.outside:
            warn(
                [f"{counted(len(counts.outside), 'link')} out of the folder not followed; add --follow-links to do so"]
            )
    say(asdict(counts), _summary(counts, output), as_json)
    if unchecked and counts.present and not as_json:
        warn([f"{UNCHECKED} ({unchecked})"])


def _warn_of_errors(counts: Audit) -> None:
    """The first errors, and how many more there are."""
    warn(counts.errors)
    if more := counts.unreadable - len(counts.errors):
        warn([f"{counted(more, 'more unreadable file')}; the records hold their errors"])


def _summary(counts: Audit, output: Path) -> list[str]:
    """The counts in words, and a line for each key that was found."""
    total = (
        f"{counted(counts.images, 'image')}: {counts.present} with a key, {counts.absent} without, "
        f"{counts.inconclusive} inconclusive, {counts.unreadable} unreadable; "
        f"{skipped(counts.skipped)}records in {output}"
    )
    return [total, *(f"  key {name[:8]}: {count}" for name, count in counts.by_key.items())]


@click.command()
@click.argument("audited", type=PATH)
@keys_option
@output_option
@alpha_option
@click.option(
    "--table",
    type=PATH,
    help="Also write a Parquet file with a row for each image and key whose p, corrected for the number of keys, is "
    "below 1.",
)
@json_option
def reaudit(
    audited: Path, key_paths: tuple[Path, ...], output: Path, alpha: float, table: Path | None, as_json: bool
) -> None:
    """Look for other keys in the images of an audit.

    AUDITED are results of ringmark audit --keep-noise. No image is opened and no model is loaded. The p-values are
    those of an audit with these keys, on the stages that each image went through: all stages after audit --thorough.
    Exit code 0: every image has a record, whatever its verdict; 2: usage error, or no such results; 130: interrupted.

    \b
    Example:
      ringmark reaudit results.parquet --key new.key -o new.parquet
      ringmark reaudit results.parquet --key keys -o new.parquet --table keys.parquet
    """
    from ringmark.watermark.tasks.reaudit import reaudit as look_again

    counts = look_again(audited, key_paths, output, alpha=alpha, table=table)
    if not as_json:
        _warn_of_errors(counts)
    say(asdict(counts), _summary(counts, output), as_json)
