"""How often the search finds a mark in changed pictures, what it costs, and how often it is wrong.

    ringmark keygen -o build/my.key
    ringmark generate --key build/my.key -n 64 --seed 810000 -o build/marked
    ringmark generate --no-mark -n 500 --seed 200000 -o build/unmarked
    python -m scripts.experiments search build/marked build/my.key build/unmarked -o build/search   # 1 hour of one core
    python -m scripts.experiments search build/marked build/my.key build/unmarked -o build/small -n 2 --keys 2

Each marked picture is changed in each of CHANGES, and put on a sheet of others, in a way of its own. It counts as found
with p ≤ α, by the ordinary test alone and by both as in `--search`: twice the smaller p, with the search where the
ordinary test finds nothing. The unmarked ones are searched as they are, for `--keys` keys drawn at random; p is that of
the search alone for each key. Times are of the processor, per picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ringmark.data.images import Sample, SizesOf, WithParts, from_array, samples_of, to_array
from ringmark.data.sources import find_images
from ringmark.watermark.attacks.chains import apply
from ringmark.watermark.detect.search import Search
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.keys.folder import load_ring
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.statistics import ALPHA
from scripts.experiments.common import Bench, experiment, read_pictures, share
from scripts.experiments.false_positives import LEVELS, bootstrap
from scripts.experiments.plots import columns, intervals, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TESTS = 2  # tests per key if pictures are searched
COLOURS = {"without": "#8d99ae", "with": "#d1495b"}


def turned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """By 1 to 359°, with black corners."""
    return image.rotate(rng.uniform(1, 359), Image.Resampling.BICUBIC)


def zoomed(image: Image.Image, across: float, down: float) -> Image.Image:
    """Enlarged about the middle by these factors; what exceeds the frame is lost."""
    width, height = image.width / across, image.height / down
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def enlarged(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """1.25 to 2 times, about the middle of the frame."""
    scale = rng.uniform(1.25, 2)
    return zoomed(image, scale, scale)


def stretched(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One of the sides, by up to a tenth."""
    scale = rng.uniform(1, 1.1)
    return zoomed(image, *((scale, 1.0) if rng.random() < 0.5 else (1.0, scale)))


def in_screenshot(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shown at 1 to 2 times its size on a page with a bar and lines of text, and saved as JPEG of quality 90."""
    side = round(rng.uniform(1, 2) * image.width)
    page = Image.new("RGB", (4 * image.width, 3 * image.height), tuple(rng.integers(200, 256, 3).tolist()))
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, page.width, image.height // 6), fill=(90, 95, 105))
    for line in range(8):
        draw.text((4, (line + 2) * image.height // 4), "words beside", fill=(30, 30, 30))
    left = int(rng.integers(image.width, page.width - side))
    top = int(rng.integers(image.height // 4, page.height - side))
    page.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    return apply("jpeg:90", page, 0)


def on_sheet(others: Sequence[Image.Image], image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """In a random place among eight others, with margins."""
    cells = list(others[:8])
    cells.insert(int(rng.integers(len(cells) + 1)), image)
    gap = image.width // 16
    step = image.width + gap
    sheet = Image.new("RGB", (3 * step + gap, 3 * step + gap), (255, 255, 255))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (gap + step * (i % 3), gap + step * (i // 3)))
    return sheet


def attacked(spec: str, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """As by `ringmark attack`."""
    return apply(spec, image, int(rng.integers(1 << 31)))


Change = Callable[[Image.Image, np.random.Generator], Image.Image]

CHANGES: dict[str, Change] = {
    "as it is": lambda image, rng: image,
    "turned by 1 to 359°": turned,
    "cropped to half the area": partial(attacked, "crop:0.5"),
    "enlarged 1.25 to 2 times": enlarged,
    "mirrored": lambda image, rng: ImageOps.mirror(image),
    "one side stretched by up to 10 %": stretched,
    "turned by -20° and cropped to 3/4": partial(attacked, "rotation:-20+crop:0.75"),
    "in a screenshot": in_screenshot,
}
SHEET = "on a contact sheet"


def changed(change: Change, images: Tensor, seed: list[int]) -> Tensor:
    """The images (N, 3, H, W) after a change, each with its own generator."""
    rngs = [np.random.default_rng([*seed, i]) for i in range(len(images))]
    after = [change(from_array(x.numpy()), rng) for x, rng in zip(images, rngs, strict=True)]
    return torch.stack([torch.from_numpy(to_array(x)) for x in after])


def views_of(sizes_of: SizesOf, images: Tensor) -> list[list[Sample]]:
    return [samples_of(from_array(x.numpy()), sizes_of, id=str(i)) for i, x in enumerate(images)]


def ordinary(verifier: Verifier, images: Tensor) -> dict[str, Tensor]:
    """p and processor time (B,) of the ordinary test for one key."""
    started = time.process_time()
    p = [judged.best.p_value for judged in verifier.scan(views_of(verifier.sizes_of, images), len(images))]
    seconds = (time.process_time() - started) / len(images)
    return {"p": torch.tensor(p, dtype=torch.float64), "seconds": torch.full((len(p),), seconds)}


def searched(search: Search, verifier: Verifier, keys: Sequence[Key], images: Tensor) -> dict[str, Tensor]:
    """p (B, K) of the search for each key, not corrected for their number, and processor time and calls (B,)."""
    schemes, model = {key.fingerprint: scheme_of(key) for key in keys}, verifier.recoverer.model
    started = time.process_time()
    samples = [views[0] for views in views_of(lambda _: WithParts([model.image_size]), images)]
    found = search(model, schemes, samples, batch=len(images))
    seconds = (time.process_time() - started) / len(images)
    p = torch.tensor([[fit.p_value for fit in row] for row in found], dtype=torch.float64)
    calls = torch.tensor([float(row[0].calls) for row in found])
    return {"p": p, "calls": calls, "seconds": torch.full((len(p),), seconds)}


def row(name: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict:
    """What the ordinary test finds, and with the search where it finds nothing, and the time of each."""
    alone, p = one["p"].numpy(), other["p"][:, 0].numpy()
    first = np.minimum(1, TESTS * alone)
    both = np.where(first <= ALPHA, first, np.minimum(first, TESTS * p))
    result: dict = {"change": name, "images": len(p)}
    for way, values in {"without": alone, "with": both}.items():
        result |= {f"{way} {key}": value for key, value in share((values <= ALPHA).sum(), len(p)).items()}
    seconds = {"ordinary seconds": one["seconds"], "search seconds": other["seconds"]}
    result |= {key: float(values.median()) for key, values in seconds.items()}
    return result | {"calls": float(other["calls"].mean())}


def false_row(found: dict[str, Tensor], seed: int) -> dict:
    """The rates of unmarked pictures at LEVELS over all keys, with a bootstrap interval over pictures."""
    p = found["p"].numpy()
    result: dict = {
        "images": len(p),
        "keys": p.shape[1],
        "least p": float(p.min()),
        "calls": float(found["calls"].mean()),
    }
    for level in LEVELS:
        low, high = bootstrap((p <= level).mean(1), seed)
        result |= {f"{level:g}": float((p <= level).mean()), f"{level:g} low": low, f"{level:g} high": high}
    return result | {"seconds": float(found["seconds"].median())}


def summary(row: dict) -> str:
    """A row as text."""
    ways = [f"{row[f'{way} count']} [{row[f'{way} low']:.3f}, {row[f'{way} high']:.3f}] {way}" for way in COLOURS]
    times = f"{row['ordinary seconds']:.2f} s + {row['search seconds']:.2f} s, {row['calls']:.1f} network calls"
    return f"{row['change']:34} found of {row['images']}: {', '.join(ways)}; {times}"


def figure_of(rows: list[dict]) -> Figure:
    """The shares found, with their intervals."""
    figure, (axis,) = panels(9, 4)
    for k, (way, colour) in enumerate(COLOURS.items()):
        x = np.arange(len(rows)) + 0.3 * (k - 0.5)
        names = [f"{way} {key}" for key in ("share", "low", "high")]
        axis.bar(x, *columns(rows, names[0]), 0.28, color=colour, label=f"{way} the search")
        intervals(axis, x, rows, *names, fmt="none", ecolor="black", capsize=3)
    axis.set(ylabel=f"marked images found at p ≤ {ALPHA:g}", ylim=(0, 1.03))
    axis.set_xticks(range(len(rows)), [r["change"] for r in rows], fontsize=8, rotation=20, ha="right")
    legend_below(figure, 2)
    return figure


def pictures_in(folder: Path, bench: Bench, number: int | None) -> Tensor:
    """The first pictures of a folder (N, 3, H, W), at the model's native size."""
    return read_pictures(find_images(folder)[:number], bench.model.image_size)


@experiment(0, drawing=False)
@click.argument("marked", type=click.Path(path_type=Path))
@click.argument("key", type=click.Path(path_type=Path))
@click.argument("unmarked", type=click.Path(path_type=Path))
@click.option(
    "--keys", "key_count", default=10, show_default=True, help="Keys that unmarked pictures are searched for."
)
def main(bench: Bench, marked: Path, key: Path, unmarked: Path, key_count: int) -> None:
    """The search in the changed pictures of MARKED, which carry KEY, and in those of UNMARKED; 0 images means all."""
    search, number = Search(), bench.number or None
    (own,) = load_ring([key]).values()
    verifier = Verifier(bench.recoverer, [own], calibration=bench.calibration)
    images, plain, rows = pictures_in(marked, bench, number), pictures_in(unmarked, bench, number), []
    others = [from_array(x.numpy()) for x in pictures_in(unmarked, bench, 8)]
    for i, (name, change) in enumerate((CHANGES | {SHEET: partial(on_sheet, others)}).items()):
        after = changed(change, images, [bench.seed, i])
        settings = ["ordinary", own.fingerprint, verifier.settings()]
        one = bench.batches(settings, partial(ordinary, verifier), after, name=name)
        look = partial(searched, search, verifier, [own])
        other = bench.batches(["search", search, own.fingerprint], look, after, name=f"{name}, search")
        rows.append(row(name, one, other))
        click.echo(summary(rows[-1]))
    keys = [bench.key(seed=[bench.seed, i]) for i in range(key_count)]
    look, names = partial(searched, search, verifier, keys), [each.fingerprint for each in keys]
    false = false_row(bench.batches(["search", search, *names], look, plain, name="unmarked"), bench.seed)
    click.echo("  ".join(f"{name} {value:.4g}" for name, value in false.items()))
    bench.write(rows, figure_of(rows), false=false, search=repr(search), alpha=ALPHA)
