"""Report an audit."""

from __future__ import annotations

from pathlib import Path

import click

from ringmark.errors import counted
from ringmark.watermark.cli.options import PATH, FilePath, Finite, force_option, json_option, say


@click.command()
@click.argument("results", type=PATH)
@click.option("-o", "--output", type=FilePath(".html"), required=True, help="The page, a file that ends in .html.")
@click.option(
    "--fdr",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="False discovery rate at which images are counted as marked, by Benjamini and Hochberg.",
)
@click.option(
    "--thumbnails",
    type=click.IntRange(0, 300),
    default=24,
    show_default=True,
    help="Maximum number of thumbnails in each list of images; 0 leaves all pictures out.",
)
@force_option
@json_option
def report(results: Path, output: Path, fdr: float, thumbnails: int, force: bool, as_json: bool) -> None:
    """Report an audit as one HTML page.

    RESULTS are those of ringmark audit. The page needs no network and no other file. It counts images by key, folder,
    model and week, compares the p-values with what unmarked images give, shows the most significant and the doubtful
    images, and lists unreadable files and settings. It holds file names and thumbnails: share it accordingly.

    \b
    Example:
      ringmark report results.jsonl -o report.html
    """
    from ringmark.watermark.tasks.report import write_report

    tally = write_report(results, output, fdr=fdr, shown=thumbnails, force=force)
    counts = {
        "output": str(output),
        "images": tally.images,
        "present": tally.outcomes["present"],
        "discoveries": tally.discoveries(fdr).number,
        "false_discovery_rate": fdr,
    }
    text = (
        f"{counted(tally.images, 'image')}: {counts['present']} with a key, {counts['discoveries']} at a false "
        f"discovery rate of {fdr:g}; reported in {output}"
    )
    say(counts, text, as_json)
