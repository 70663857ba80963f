"""Figures: the explain picture reads well in every mode, says that it is a secret, and never loses its verdict."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from identity import key, pictures, verifier
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ringmark.data.files import is_ours
from ringmark.data.images import Sample, from_array
from ringmark.errors import StoreError
from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verdict import Judged, Verdicts
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.evaluation.plots import RocDisplay, roc_figure
from ringmark.watermark.evaluation.rates import roc
from ringmark.watermark.figures import (
    SECRET,
    PValueDisplay,
    RecoveryDisplay,
    ScoreDisplay,
    SpectrumDisplay,
    _evidence,
    drawable,
    explain,
    key_figure,
    recovery_figure,
    save_figure,
)
from ringmark.watermark.schemes.base import Panel

NAMES = {
    "plain": "picture.png",
    "long": "a very long file name " * 12 + ".png",
    "Japanese": "夕焼けの湖と雪の山々、とても長い名前の写真ファイル" * 3 + ".png",
    "Arabic": "صورة البحيرة عند غروب الشمس.png",
    "emoji": "😀🎉 holiday $x_1$ \n \N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}.png",
}
NOTE = "the picture is 33x47 pixels, enlarged to the model's 512x512, so that a verdict may well be wrong" * 3


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """matplotlib warns of glyphs that a font lacks, which come out as boxes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def judged(verifier: Verifier, marked: bool) -> Judged:
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    if marked:
        noise = next(iter(verifier.detector.schemes.values())).embed(noise)
    (found,) = verifier.scan(pictures(noise))
    return found


def changed(found: Judged, **changes: object) -> Judged:
    return found._replace(verdicts=Verdicts.of([replace(verdict, **changes) for verdict in found.verdicts]))


def calibrated(plain: Verifier) -> Verifier:
    noise = np.random.default_rng(0).normal(size=(60, 3, 32, 32))
    measured = Calibration.measure(noise, plain.recoverer.settings.as_dict(), {"drawn": 60})
    return Verifier(plain.recoverer, plain.detector.keys, calibration=measured)


def drawn(figure: Figure) -> FigureCanvasAgg:
    """Draws the figure, which lays it out."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


MODES = ("present", "absent", "inconclusive", "search", "calibration", "several", "all", "flat", "underflow")


def in_mode(mode: str, pattern: str) -> tuple[Verifier, Judged]:
    used = verifier([key(i, pattern) for i in range(1, 8 if mode in ("several", "all") else 2)])
    if mode == "calibration":
        used = calibrated(used)
    found = judged(used, marked=mode not in ("absent", "several"))
    changes = {
        "inconclusive": {"present": None, "notes": (NOTE,)},
        "search": {
            "present": True,
            "by_search": True,
            "score": 0.6,
            "p_value": 3e-12,
            "log10_p": -11.5,
            "notes": (NOTE,),
        },
        "all": {"present": True, "p_value": 1e-9, "log10_p": -9.0},
        "underflow": {"p_value": 0.0, "log10_p": -2000.0, "by_search": True},
    }
    if mode == "flat":
        (found,) = used.scan([[Sample("flat", from_array(np.zeros((3, 32, 32), np.float32)))]])
    return used, changed(found, **changes.get(mode, {}))


@pytest.mark.parametrize("pattern", ["rand", "ring", "zeros"])
@pytest.mark.parametrize("mode", MODES)
def test_the_explain_picture_is_whole_in_every_mode(mode: str, pattern: str) -> None:
    used, found = in_mode(mode, pattern)
    figure = explain(used.detector, found, NAMES["plain"])
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "picture.png" and texts[-1] == SECRET
    assert " ".join(texts[1:-1]) == found.sentence()
    image, *spectra, evidence = figure.axes
    assert image.images and all(ax.images for ax in spectra) and len(spectra) == 2
    assert evidence.lines and "this image" in " ".join(t.get_text() for t in evidence.get_legend().get_texts())
    assert_nothing_collides(figure)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_hides_the_verdict(name: str) -> None:
    used, found = in_mode("inconclusive", "rand")
    figure = explain(used.detector, found, NAMES[name])
    assert " ".join(text.get_text() for text in figure.texts[1:-1]) == found.sentence()
    assert figure.texts[0].get_text().endswith(".png") and "\n" not in figure.texts[0].get_text()
    assert_nothing_collides(figure)


def assert_nothing_collides(figure: Figure) -> None:
    """Texts lie within the figure and apart from each other and from the panels; so do the labels of each axis."""
    renderer = drawn(figure).get_renderer()
    lines = [text.get_window_extent(renderer) for text in figure.texts]
    panels = [ax.get_tightbbox(renderer) for ax in figure.axes]
    for box in (*lines, *panels):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for i, box in enumerate((*lines, *panels)):
        assert not any(box.overlaps(other) for other in (*lines, *panels)[:i])
    for axis in (axis for ax in figure.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)):
        labels = [label.get_window_extent(renderer) for label in axis.get_ticklabels() if label.get_text()]
        for i, box in enumerate(labels):
            assert not any(box.overlaps(other) for other in labels[:i])


def test_text_that_can_be_drawn() -> None:
    assert drawable("é ü σ ≤ 😀") == "é ü σ ≤ 😀" and drawable("夕\n") == r"\u5915\n"
    short = drawable("a" * 300 + ".png", 40)
    assert len(short) == 40 and short.startswith("aaa") and short.endswith("a.png") and "…" in short
    escaped = drawable("夕" * 100, 40)
    assert len(escaped) <= 40 and set(escaped.replace("…", "").split("\\u")) == {"", "5915"}  # no torn escape
    assert drawable("a" * 40, 40) == "a" * 40


def test_the_limit_is_where_p_is_alpha() -> None:
    used, found = in_mode("several", "rand")
    *_, ax = explain(used.detector, found, "a.png").axes
    limit = next(line for line in ax.lines if line.get_label() == "p = 0.001").get_xdata()[0]
    assert limit == used.detector.threshold(found.best.key)


def test_a_density_integrates_to_one() -> None:
    used, found = in_mode("absent", "rand")
    evidence = _evidence(used.detector, found.best)
    assert isinstance(evidence, ScoreDisplay) and evidence.references is None
    assert np.trapezoid(evidence.density, evidence.x) == pytest.approx(1, abs=1e-3)
    certain = _evidence(used.detector, replace(found.best, score=1.0))
    assert np.isfinite(certain.density).all() and certain.x[-1] > 1  # beyond the end of a cosine's density
    assert len(_evidence(calibrated(used).detector, found.best).references) == 60
    assert isinstance(_evidence(used.detector, replace(found.best, by_search=True)), PValueDisplay)
    assert isinstance(_evidence(used.detector, replace(found.best, score=float("nan"))), PValueDisplay)


def test_displays_draw_their_numbers() -> None:
    values = np.zeros((9, 8))
    inside = np.zeros((9, 8), bool)
    inside[4, 4:6] = True
    assert SpectrumDisplay(Panel(title="title", values=values, inside=inside, radii=(0, 1), side=2)).scale == 1
    values[4, 4] = 3.0
    display = SpectrumDisplay(Panel(title="title", values=values, inside=inside, radii=(0, 1), side=2))
    assert display.scale == pytest.approx(np.sqrt(9 / 2))
    ax = Figure().subplots()
    display.plot(ax)
    assert len(ax.patches) == 1 and ax.get_title() == "title"  # radius 0 has no inner circle
    few, many = roc([2.0, 3.0], [0.0, 1.0], name="few"), roc([2.0, 3.0], np.arange(99) / 99, name="many")
    assert RocDisplay([few]).floor == 0.25 and RocDisplay([few, many]).floor == 0.5 / 99
    lines = [len(roc_figure(curves).axes[0].lines) for curves in ([few], [many])]
    assert roc_figure([roc([2.0, 3.0], [0.0])]).axes[0].get_title() == "2 marked, 1 unmarked image"
    assert lines == [2, 3]  # no line at an FPR that two images cannot tell
    recovery = NoiseRecovery(torch.full((4, 5), 0.6).double(), torch.full((4, 5), 0.64).double())
    assert RecoveryDisplay.of(recovery).correlation == pytest.approx(np.full((4, 5), 0.6))
    assert len(recovery_figure(recovery).axes[0].lines) == 5


def test_the_picture_of_a_key_says_that_it_is_a_secret(tmp_path) -> None:
    for pattern in ("rand", "ring", "zeros"):
        figure = key_figure(key(1, pattern))
        drawn(figure)
        assert len(figure.axes) == 2
        assert figure.get_supxlabel() == SECRET


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_only_our_own_files_are_replaced(tmp_path, suffix: str) -> None:
    path, figure = tmp_path / f"new/curve.{suffix}", roc_figure([roc([2.0], [1.0])])
    for _ in range(2):
        save_figure(figure, path)
        assert is_ours(path)
    if suffix == "png":
        with Image.open(path) as image:
            assert image.info["Software"] == "ringmark"
    theirs = tmp_path / f"theirs.{suffix}"
    theirs.write_bytes(b"a photograph")
    (tmp_path / f"link.{suffix}").symlink_to(theirs)
    for name in ("theirs", "link"):
        with pytest.raises(StoreError) as error:
            save_figure(figure, tmp_path / f"{name}.{suffix}")
        assert error.value.code == "file.foreign" and theirs.read_bytes() == b"a photograph"
    save_figure(figure, theirs, 0o600, force=True)
    assert is_ours(theirs)
