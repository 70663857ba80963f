"""Pictures on a page are cut out to the pixel; what has no page around it is left whole."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ringmark.data import cuts
from ringmark.data.cuts import boxes
from ringmark.data.images import WithParts, samples_of


def picture(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Noise, of no one colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def page(size: tuple[int, int], colour: tuple[int, int, int], at: list[tuple[int, int]]) -> Image.Image:
    """Pictures at these places (left, top) of a page."""
    whole = Image.new("RGB", size, colour)
    for i, place in enumerate(at):
        whole.paste(picture(i), place)
    return whole


SHEET = [(10 + 110 * i, 12 + 105 * j) for j in range(2) for i in range(3)]


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (40, 44, 52)])
def test_a_contact_sheet(colour):
    sheet = page((340, 230), colour, SHEET)
    assert sorted(boxes(sheet, least=64)) == sorted((x, y, x + 96, y + 96) for x, y in SHEET)
    assert len(boxes(sheet, least=64, most=4)) == 4 and not boxes(sheet, least=97)


def test_a_screenshot_with_a_bar_and_text():
    shot = page((400, 300), (250, 250, 250), [(150, 90)])
    draw = ImageDraw.Draw(shot)
    draw.rectangle((0, 0, 400, 30), fill=(200, 205, 210))
    draw.text((20, 120), "a few words", fill=(20, 20, 20))
    assert boxes(shot, least=64) == [(150, 90, 246, 186)]


def test_pictures_without_a_page_have_none():
    assert boxes(picture(0), least=16) == [] and boxes(Image.new("RGB", (90, 90), "red"), least=16) == []


def test_a_page_of_dots_is_not_cut_into_all_of_them(monkeypatch):
    sheet = np.asarray(page((400, 300), (250, 250, 250), [(150, 90)])).copy()
    dots = sheet[::2, ::2]
    dots[(dots == 250).all(2)] = 0
    cut, asked = cuts._cut, []
    monkeypatch.setattr(cuts, "_cut", lambda *given: asked.append(given) or cut(*given))
    assert boxes(Image.fromarray(sheet), least=64) == [(150, 90, 247, 187)] and len(asked) < 10


def test_parts_are_read_if_they_are_asked_for():
    sheet = page((340, 230), (255, 255, 255), SHEET)
    (plain,), (cut,) = (
        samples_of(sheet, ask, id="a") for ask in (lambda _: [(96, 96)], lambda _: WithParts([(96, 96)]))
    )
    assert plain.parts == () and len(cut.parts) == len(SHEET) and cut.image.tobytes() == plain.image.tobytes()
    assert {part.tobytes() for part in cut.parts} == {picture(i).tobytes() for i in range(len(SHEET))}
    (small,) = samples_of(sheet, lambda _: WithParts([(240, 340)]), id="a")
    assert small.parts == ()
