"""The report of an audit: one HTML page, from results of any size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from ringmark.data.files import refuse_foreign, write_atomic
from ringmark.data.images import thumbnail
from ringmark.data.locations import is_web
from ringmark.data.reader import read_results, read_settings
from ringmark.data.schema import file_name
from ringmark.errors import ImageError, StoreError
from ringmark.watermark.evaluation.page import Thumbnail, render
from ringmark.watermark.evaluation.tally import COLUMNS, Row, Tally

__all__ = ["FDR", "SHOWN", "write_report"]

FDR, SHOWN = 0.05, 24
SIDE = 256  # pixels of a thumbnail


def write_report(results: Path, output: Path, *, fdr: float = FDR, shown: int = SHOWN, force: bool = False) -> Tally:
    """Write the report of an audit's results to an HTML file, atomically.

    `fdr` is the false discovery rate in (0, 1); `shown`, how many thumbnails each list of images has at most. They are
    read from the audited folder, if it is there.

    Raises StoreError for results that cannot be read, that are not those of an audit (results.no-audit), and as
    `refuse_foreign` does for the output.
    """
    refuse_foreign(output, force)
    settings = read_settings(results)
    tally = Tally(_alpha(results, settings))
    with tqdm(desc="report", unit="record", unit_scale=True, disable=None) as bar:
        for table in read_results(results, COLUMNS):
            tally.add(table)
            bar.update(len(table))
    folder = settings.get("folder")
    audited = results.parent / folder if isinstance(folder, str) else None
    page = render(
        tally,
        settings,
        title=f"Audit of {folder}" if audited else f"Audit recorded in {results.name}",
        written=f"{results.name}, reported by ringmark {version('ringmark')} on {datetime.now(timezone.utc):%Y-%m-%d}",
        fdr=fdr,
        pictures=_pictures(tally, audited, output, shown),
        shown=shown,
    )
    write_atomic(output, page)
    return tally


def _alpha(results: Path, settings: Mapping[str, Any]) -> float:
    alpha = settings.get("alpha")
    if isinstance(alpha, float) and 0 < alpha < 1:
        return alpha
    raise StoreError("results.no-audit", "is not the results of an audit", subject=results)


def _pictures(tally: Tally, folder: Path | None, output: Path, shown: int) -> dict[str, Thumbnail]:
    """The pictures of all listed records, by name; the first `shown` of each list have a thumbnail."""
    lists = [best.rows() for best in (tally.significant, tally.inconclusive, tally.near)]
    drawn = {row.name for rows in lists for row in rows[:shown]}
    return {row.name: _picture(row, folder, output, draw=row.name in drawn) for rows in lists for row in rows}


def _picture(row: Row, folder: Path | None, output: Path, *, draw: bool) -> Thumbnail:
    """The picture of a record: a link on the web, or a file inside the audited folder that has not changed since."""
    if folder is None:
        return Thumbnail(row.name if is_web(row.name) else "", b"", "not shown")
    path = folder / file_name(row.name)
    try:
        real = path.resolve()
        if not real.is_relative_to(folder.resolve()):
            return Thumbnail("", b"", "outside the audited folder")
        if not real.is_file():
            return Thumbnail("", b"", "file not found")
        changed = real.stat().st_size != row.size
    except (OSError, ValueError):
        return Thumbnail("", b"", "file not found")
    link = quote(os.fsencode(os.path.relpath(path, output.parent).replace(os.sep, "/")))
    if changed or not draw:
        return Thumbnail(link, b"", "file has changed since the audit" if changed else "not shown")
    try:
        return Thumbnail(link, thumbnail(real, SIDE))
    except ImageError as error:
        return Thumbnail(link, b"", error.fact)
