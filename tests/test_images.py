"""Every file is read to the right pixels, with what was done said, or refused in one line that says why."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, TiffImagePlugin, features

from ringmark.data import decode, decoder_process
from ringmark.data.files import is_ours, one_line
from ringmark.data.images import (
    Sample,
    fit,
    from_array,
    read_image,
    read_sample,
    samples_of,
    save_png,
    thumbnail,
    to_array,
)
from ringmark.errors import ImageError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
PHOTO = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(path)
    return path


def pixels(path, *notes: str) -> np.ndarray:
    """What is read from path; it must be RGB and come with exactly these notes."""
    image, said = read_image(path)
    assert image.mode == "RGB" and image.info == {} and said == notes
    return np.asarray(image)


def refusal(path) -> ImageError:
    """The error with which a file is refused: one line that starts with the path and gives a reason."""
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{one_line(path)}: ") and "\n" not in message and "()" not in message
    return caught.value


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG with this header and these chunks."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


# -- formats and modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_formats_are_read_exactly(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(PHOTO).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(pixels(path), PHOTO)


@pytest.mark.parametrize("suffix", ["jpg", "webp", *(["avif"] if "avif" in features.get_supported() else [])])
def test_lossy_formats_are_read_closely(tmp_path, suffix):
    path, smooth = tmp_path / f"x.{suffix}", np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
    Image.fromarray(smooth).resize((64, 64)).save(path, quality=95)
    assert np.abs(np.asarray(Image.fromarray(smooth).resize((64, 64)), float) - pixels(path)).mean() < 8


def test_the_content_decides_not_the_name(tmp_path, photo):
    assert np.array_equal(pixels(photo.rename(tmp_path / "photo.jpg")), PHOTO)


def test_grey_palette_and_one_bit(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(RAMP).save(path)
    assert np.array_equal(pixels(path), np.repeat(RAMP[..., None], 3, -1))
    Image.fromarray(RAMP > 100).save(path)
    assert np.array_equal(pixels(path)[..., 0], np.where(RAMP > 100, 255, 0))
    palette = Image.fromarray(PHOTO).quantize(16)
    palette.save(path)
    assert np.array_equal(pixels(path), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_laid_over_white(tmp_path, mode):
    path = tmp_path / "x.png"
    image = Image.new("L", (16, 16), 60).convert(mode)
    image.putalpha(Image.fromarray(RAMP))
    image.save(path)
    expected = 255 - (255 - 60) * (RAMP / 255)
    assert np.abs(pixels(path, "alpha over white") - expected[..., None]).max() <= 1
    image.putalpha(255)
    image.save(path)
    assert (pixels(path) == 60).all()


def test_a_transparent_colour_becomes_white(tmp_path):
    path = tmp_path / "x.png"
    palette = Image.fromarray(RAMP // 64, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    palette.save(path, transparency=1)
    seen = pixels(path, "alpha over white")
    assert (seen[RAMP // 64 == 1] == 255).all() and (seen[RAMP // 64 == 2] == (70, 80, 90)).all()
    palette.save(path, transparency=bytes([255, 128, 255, 0]))
    seen = pixels(path, "alpha over white")
    assert (seen[RAMP // 64 == 3] == 255).all() and (seen[RAMP // 64 == 0] == (10, 20, 30)).all()
    Image.fromarray(RAMP).save(path, transparency=7)
    assert (pixels(path, "alpha over white")[RAMP == 7] == 255).all()
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path, transparency=7 * 257)
    seen = pixels(path, "16 bits reduced to 8", "alpha over white")
    assert (seen[RAMP == 7] == 255).all() and (seen[RAMP == 6] == 6).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    assert np.array_equal(pixels(path, "16 bits reduced to 8")[..., 0], RAMP)


def test_twelve_bits_are_scaled(tmp_path):
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 2 2 4095\n" + struct.pack(">4H", 0, 1365, 2730, 4095))
    assert read_image(path)[0].getchannel("R").tobytes() == bytes([0, 85, 170, 255])


def test_sixteen_bit_colour_is_said(tmp_path):
    path, row = tmp_path / "x.png", struct.pack(">B3H", 0, 0x1234, 0xFFFF, 0)
    path.write_bytes(
        png(1, 1, (b"IDAT", zlib.compress(row))).replace(
            *(
                head + struct.pack(">I", zlib.crc32(head))
                for head in (
                    b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0),
                    b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0),
                )
            )
        )
    )
    assert pixels(path, "16 bits reduced to 8").tolist() == [[[0x12, 255, 0]]]


@pytest.mark.parametrize(("values", "white"), [([0, 0.2, 1], 1), ([0, 51, 255], 255), ([0, 13107, 65535], 65535)])
def test_floats_are_scaled_from_the_range_they_use(tmp_path, values, white):
    path = tmp_path / "x.tif"
    Image.fromarray(np.float32([values])).save(path)
    assert pixels(path, f"32 bits reduced to 8, 0 to {white} taken as black to white")[0, :, 0].tolist() == [0, 51, 255]


def test_unusual_ranges_are_stretched_and_flat_ones_survive(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.int32([[-100, 0, 155]])).save(path)
    assert pixels(path, "32 bits reduced to 8, -100 to 155 taken as black to white")[0, :, 0].tolist() == [0, 100, 255]
    Image.fromarray(np.full((4, 4), -3, np.int32)).save(path)
    assert (read_image(path)[0].getextrema()[0]) == (0, 0)
    Image.fromarray(np.float32([[0, np.nan]])).save(path)
    assert "finite" in refusal(path).fact


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr"])
def test_other_colour_spaces_come_out_as_rgb(tmp_path, mode):
    path = tmp_path / "x.tif"
    colour = {"CMYK": (255, 0, 255, 0), "LAB": (180, 60, 200), "YCbCr": (150, 44, 21)}[mode]  # greens
    Image.new(mode, (8, 8), colour).save(path, compression="tiff_lzw")
    r, g, b = pixels(path)[0, 0].astype(int)
    assert g > r + 40 and g > b + 40


def test_uncompressed_ycbcr_is_read_rightly_or_refused(tmp_path):
    path = tmp_path / "x.tif"
    Image.new("YCbCr", (8, 8), (150, 44, 21)).save(path)
    path.write_bytes(path.read_bytes() + bytes(64))  # so that reading too far does not end in an error by itself
    try:
        assert pixels(path)[7, 7].tolist() == [0, 255, 1]
    except ImageError as error:
        assert error.code == "image.misread"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_exif_orientation_is_applied_once(tmp_path, suffix, orientation):
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("white", (0, 0, 24, 16))
    upright.paste("red", (24, 0, 48, 16))
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Image.Transpose that turns the upright picture into the stored one
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    stored.save(
        path,
        exif=exif,
        **({"quality": 95} if suffix == "jpg" else {}),
        **({"lossless": True} if suffix == "webp" else {}),
    )
    seen = pixels(path, *(["rotated by its EXIF orientation"] if orientation > 1 else []))
    assert seen.shape == (32, 48, 3)
    assert np.abs(seen.astype(int) - np.asarray(upright)).mean() < 6


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    path, frames = tmp_path / f"x.{suffix}", [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    assert (pixels(path, "first frame of several") == (255, 0, 0)).all()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, code in (
        ("missing.png", "image.missing"),
        ("", "image.folder"),
        ("empty.png", "image.empty"),
        ("loop.png", "image.unreadable"),
    ):
        assert refusal(tmp_path / name).code == code
    assert "null byte" in refusal("a\0b").fact


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        assert refusal(path).code == "image.special"


def test_what_may_not_be_read_is_refused(photo, monkeypatch):
    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    assert refusal(photo).code == "image.denied"


@pytest.mark.parametrize(
    "content",
    [b"hello\n", b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"\x89PNG\r\n"],
)
def test_what_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert refusal(path).code == "image.unknown-format"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(PHOTO).save(path)
    data, whole = path.read_bytes(), pixels(path)
    for cut in np.linspace(1, len(data) - 1, 25).astype(int):
        path.write_bytes(data[:cut])
        try:
            seen = pixels(path)
        except ImageError as error:
            assert "\n" not in str(error)
        else:  # only a trailer was lost
            assert np.array_equal(seen, whole) and cut > 0.9 * len(data)


def test_half_a_file_is_called_damaged(photo):
    photo.write_bytes(photo.read_bytes()[:700])
    assert refusal(photo).code == "image.damaged"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [8001, 9500, 40_000, 2**31 - 1])
def test_bombs_are_refused_from_their_headers(tmp_path, side, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, (b"IDAT", zlib.compress(b"\0" * 1000))))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("a pixel was decoded"))
    assert refusal(path).code == "image.too-large" and "64 million pixels" in refusal(path).fact


def test_the_limit_itself_is_allowed(photo, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", PHOTO.shape[0] * PHOTO.shape[1])
    pixels(photo)
    monkeypatch.setattr(decode, "MAX_PIXELS", PHOTO.shape[0] * PHOTO.shape[1] - 1)
    assert refusal(photo).code == "image.too-large"


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels_are_refused(tmp_path, size):
    path = tmp_path / "x.png"
    path.write_bytes(png(*size, (b"IDAT", zlib.compress(b""))))
    assert refusal(path).code == "image.no-pixels"


def test_messages_stay_on_one_line(tmp_path):
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "a\nb.png")
    assert str(caught.value) == f"{tmp_path}/a\\nb.png: no such file"


@pytest.mark.filterwarnings("error")
@settings(max_examples=150, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
def test_damage_never_escapes_as_another_error(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("damage") / "x"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTO).save(path, suffix, **({} if suffix in ("GIF", "BMP") else {"exif": exif}))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert read_image(path)[0].mode == "RGB"
    except ImageError as error:
        assert str(error).startswith(str(path))


def test_reading_in_threads_and_with_pillow_as_it_was(photo):
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(image, PHOTO) for image, _ in pool.map(read_image, [photo] * 64))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


# -- damage and bombs -------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def interlaced(content: bytes) -> bytes:
    """The same PNG, whose header says that it is interlaced."""
    header = content[12:28] + b"\1"
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def smooth(side: int = 64) -> Image.Image:
    return Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], -1)).resize((side, side), Image.Resampling.BICUBIC)


def refused_as(path, content: bytes) -> str:
    path.write_bytes(content)
    return refusal(path).code


@pytest.mark.parametrize("exif", [False, True])
def test_a_png_with_one_damaged_byte_of_pixels_is_refused(tmp_path, exif):
    content = bytearray(encoded(Image.fromarray(PHOTO), "PNG", **({"exif": Image.Exif()} if exif else {})))
    start = content.index(b"IDAT") + 4
    content[start + 500] ^= 1
    assert refused_as(tmp_path / "x.png", content) == "image.damaged"
    length = int.from_bytes(content[start - 8 : start - 4], "big")
    crc = zlib.crc32(content[start - 4 : start + length])
    content[start + length : start + length + 4] = crc.to_bytes(4, "big")
    try:  # now only the compressed stream itself can tell
        read_image(tmp_path / "x.png")
    except ImageError as error:
        assert error.code == "image.damaged"


@pytest.mark.parametrize("rows", [0, 1, 15])
@pytest.mark.parametrize("adam7", [False, True])
def test_a_png_with_too_few_rows_is_refused(tmp_path, rows, adam7):
    row = b"\0" + bytes(16)
    data = zlib.compress(row * rows, 0)
    content = png(16, 16, (b"IDAT", data))
    assert refused_as(tmp_path / "x.png", interlaced(content) if adam7 else content) == "image.damaged"


def test_interlaced_and_black_pngs_are_read(tmp_path):
    path = tmp_path / "x.png"
    rows = [b"\0\1", b"\0\2", b"\0\3\4", b"\0\5", b"\0\6", b"\0\7\x08\x09"]  # passes 1, 4, 5, 6, 6 and 7
    path.write_bytes(interlaced(png(3, 3, (b"IDAT", zlib.compress(b"".join(rows))))))
    assert pixels(path)[..., 0].tolist() == [[1, 5, 2], [7, 8, 9], [3, 6, 4]]
    for mode in ("1", "L", "RGB", "RGBA", "P", "I;16"):
        Image.new(mode, (5, 7)).save(path)
        assert read_image(path)[0].size == (5, 7)


def test_a_header_without_data_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("a pixel was decoded"))
    content = png(7999, 8000, (b"IDAT", zlib.compress(bytes(4000))))
    assert refused_as(tmp_path / "x.png", content) == "image.damaged"


JPEGS = {
    "baseline": {"quality": 90},
    "progressive": {"quality": 90, "progressive": True},
    "restarts": {"quality": 90, "restart_marker_blocks": 3},
    "grey": {"quality": 60},
    "full": {"quality": 95, "subsampling": 0},
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_ends_early_is_refused_whatever_follows(tmp_path, name):
    image = smooth(80).convert("L") if name == "grey" else smooth(80)
    content, path = encoded(image, "JPEG", **JPEGS[name]), tmp_path / "x.jpg"
    path.write_bytes(content)
    assert read_image(path)[1] == ()
    start = content.index(b"\xff\xda") + 20
    for cut in [*range(start, len(content) - 12, max(1, (len(content) - start) // 12)), len(content) - 8]:
        assert refused_as(path, content[:cut]) == "image.damaged"
        assert refused_as(path, content[:cut].rstrip(b"\xff") + b"\xff\xd9") == "image.damaged", cut


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("tail", [b"\xff\xff\xff\xd9", b"\0\0\xff\xd9", b"\xff\xd9 and more", b"\xff\xd9\xff\xda\xff"])
def test_a_jpeg_may_end_in_other_ways(tmp_path, name, tail):
    content, path = encoded(smooth(80), "JPEG", **JPEGS[name]), tmp_path / "x.jpg"
    path.write_bytes(content[:-2] + tail)
    assert read_image(path)[0].size == (80, 80)


def test_a_flat_grey_jpeg_is_read(tmp_path):
    for colour in ("#808080", "black", "white"):
        (tmp_path / "x.jpg").write_bytes(encoded(Image.new("RGB", (64, 64), colour), "JPEG"))
        assert read_image(tmp_path / "x.jpg")[0].getpixel((63, 63)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))


def test_large_metadata_of_a_png_is_ignored(tmp_path):
    path, text = tmp_path / "x.png", "long " * 500_000
    for zipped in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_text("graph", text, zip=zipped)
        info.add_itxt("graph", text, zip=zipped)
        Image.fromarray(PHOTO).save(path, pnginfo=info)
        assert np.array_equal(pixels(path), PHOTO)
    Image.fromarray(PHOTO).save(path, icc_profile=bytes(1_500_000))
    assert np.array_equal(pixels(path, "colour profile ignored: it is damaged or does not match the image"), PHOTO)


def test_compressed_metadata_is_never_inflated(tmp_path):
    path, squeeze = tmp_path / "x.png", zlib.compressobj(9)
    bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(64)) + squeeze.flush()
    chunks = [(b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb)]
    path.write_bytes(png(16, 16, *chunks * 5, (b"IDAT", zlib.compress((b"\0" + bytes(range(16))) * 16))))
    tracemalloc.start()
    assert pixels(path, "colour profile ignored: it is damaged or does not match the image")[3, 5, 0] == 5
    assert tracemalloc.get_traced_memory()[1] < 30 << 20
    tracemalloc.stop()


def test_a_strip_of_many_rows_is_refused_before_it_is_decoded(tmp_path):
    strip = png(1, 64_000_000, (b"IDAT", zlib.compress(bytes(1000))))
    assert refused_as(tmp_path / "x.png", strip) == "image.too-large"
    assert refused_as(tmp_path / "x.pgm", b"P5 1 64000000 255\n") == "image.too-large"


def test_huge_screens_are_refused_from_their_headers(tmp_path):
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0;"
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x81\0\0" + bytes(12) + frame
    webp = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2 + b"VP8L\0\0\0\0"
    assert refused_as(tmp_path / "x.gif", gif) == refused_as(tmp_path / "x.webp", webp) == "image.too-large"


def test_scans_and_segments_of_a_jpeg_are_bounded(tmp_path):
    content = encoded(Image.new("L", (64, 64), 99), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    assert refused_as(tmp_path / "x.jpg", content[:-2] + scan * 5000 + b"\xff\xd9") == "image.too-costly"
    comments = content[:2] + b"\xff\xfe\0\2" * 300_000 + content[2:]
    assert refused_as(tmp_path / "x.jpg", comments) == "image.too-costly"
    assert refused_as(tmp_path / "x.png", png(1, 1, *[(b"tEXt", b"")] * 300_000)) == "image.too-costly"


def many_pages(pages: int) -> bytes:
    """A TIFF whose page descriptions form a chain of this length."""
    tiff = encoded(Image.new("L", (16, 16), 7), "TIFF")
    (first,) = struct.unpack("<I", tiff[4:8])
    (tags,) = struct.unpack("<H", tiff[first : first + 2])
    page, start = tiff[first : first + 2 + 12 * tags], len(tiff)
    chain = (page + struct.pack("<I", start + (k + 1) * (len(page) + 4) if k + 1 < pages else 0) for k in range(pages))
    return tiff[:4] + struct.pack("<I", start) + tiff[8:] + b"".join(chain)


def test_pages_are_not_counted(tmp_path, monkeypatch):
    path = tmp_path / "x.tif"
    path.write_bytes(many_pages(20_000))
    assert (pixels(path, "first frame of several") == 7).all()
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(lambda _: pytest.fail("counted")))
    with open(path, "rb") as file:
        image, notes = decode.decode(path, decode.counted(file), limited=True)
    assert notes == ("first frame of several",) and (np.asarray(image) == 7).all()


def test_a_damaged_later_frame_does_not_matter(tmp_path):
    path = tmp_path / "x.gif"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    second = gif.index(b"\x2c", gif.index(b"\x2c") + 1)
    for later in (gif[: second + 5], gif[: second + 12] + b"\xff" * 50, gif[:second] + b"\x99" * 50):
        path.write_bytes(later)
        assert (np.asarray(read_image(path)[0]) == (255, 0, 0)).all()


def test_what_costs_too_much_is_given_up_and_the_next_file_is_read(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(decoder_process, "WAIT_SECONDS", 0.5)
    endless = b"P6 #" + b"a" * 60_000_000 + b"\n1 1 255\nabc"
    assert refused_as(tmp_path / "x.ppm", endless) == "image.too-costly"
    assert "x.ppm" in caplog.text
    monkeypatch.undo()
    (tmp_path / "y.ppm").write_bytes(b"P6 1 1 255\nabc")
    assert pixels(tmp_path / "y.ppm").tolist() == [[list(b"abc")]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no limit of memory")
def test_memory_of_the_other_process_is_limited(tmp_path):
    n, size = 300, 5_000_000
    tags = b"".join(struct.pack("<HHII", 1000 + k, 7, size, 8) for k in range(n))
    path = tmp_path / "x.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + size) + bytes(size) + struct.pack("<H", n) + tags + bytes(4))
    assert refusal(path).code in ("image.damaged", "image.too-costly")


def test_a_forked_process_has_a_decoder_of_its_own(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    path = tmp_path / "x.bmp"
    Image.fromarray(PHOTO).save(path)
    assert np.array_equal(pixels(path), PHOTO)
    script = f"""
import os
from ringmark.data.images import read_image
first = read_image({str(path)!r})[0].tobytes()
child = os.fork()
same = all(read_image({str(path)!r})[0].tobytes() == first for _ in range(20))
if not child:
    os._exit(not same)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_nothing_reaches_stderr(tmp_path, capfd):
    path = tmp_path / "x.tif"
    Image.fromarray(PHOTO).save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[30:60] = b"\xaa" * 30
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read_image(path)
        except ImageError:
            pass
        exif = encoded(smooth(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01\3\0\1\0\0\0")
        path.write_bytes(exif)
        notes = read_image(path)[1]
    assert any(note.startswith("metadata: ") for note in notes) and not caught
    assert capfd.readouterr() == ("", "")


def test_warnings_of_others_are_passed_on(photo, monkeypatch):
    opened = Image.open

    def open_loudly(*args, **options):
        warnings.warn("mine", UserWarning, stacklevel=1)
        return opened(*args, **options)

    monkeypatch.setattr(Image, "open", open_loudly)
    with pytest.warns(UserWarning, match="mine"):
        assert read_image(photo)[1] == ()


# -- colours ----------------------------------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """An RGB profile whose red and green primaries have changed places."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[132 + 12 * k : 136 + 12 * k]): 132 + 12 * k for k in range(profile[131])}
    red, green = (slice(tags[name] + 4, tags[name] + 12) for name in (b"rXYZ", b"gXYZ"))
    profile[red], profile[green] = profile[green], profile[red]
    return bytes(profile)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_colours_are_converted_to_srgb(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    for mode, colour in (("RGB", (200, 90, 30)), ("RGBA", (200, 90, 30, 255)))[: 1 if suffix == "jpg" else 2]:
        Image.new(mode, (16, 16), colour).save(path, icc_profile=swapped_profile(), **options)
        image, (note,) = read_image(path)
        assert note.startswith("colours converted to sRGB from sRGB") and image.info == {}
        assert np.abs(np.asarray(image)[8, 8].astype(int) - (90, 200, 30)).max() <= 6
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        Image.new(mode, (16, 16), colour).save(path, icc_profile=srgb, **options)
        assert np.abs(pixels(path)[8, 8].astype(int) - colour[:3]).max() <= 3


@pytest.mark.parametrize("profile", [b"", b"profile", swapped_profile()[:300]])
def test_a_profile_that_does_not_fit_is_ignored(tmp_path, profile):
    path = tmp_path / "x.png"
    Image.fromarray(RAMP).save(path, icc_profile=profile or None)
    note = ["colour profile ignored: it is damaged or does not match the image"] if profile else []
    assert np.array_equal(pixels(path, *note)[..., 0], RAMP)
    Image.fromarray(RAMP).save(path, icc_profile=swapped_profile())
    assert np.array_equal(
        pixels(path, "colour profile ignored: it is damaged or does not match the image")[..., 0], RAMP
    )


# -- sizes and arrays -------------------------------------------------------------------------------------------------


def test_the_right_size_is_left_alone():
    image = Image.fromarray(PHOTO)
    assert fit(image, (24, 20)) == (image, None) and fit(image, (24, 20))[0] is image


@pytest.mark.parametrize(
    ("size", "note"),
    [
        ((481, 321), "resized 481x321 -> 192x128 and centre-cropped to 128x128"),
        ((256, 256), "resized 256x256 -> 128x128"),
        ((64, 32), "resized 64x32 -> 256x128 and centre-cropped to 128x128"),
        ((131, 128), "131x128 centre-cropped to 128x128"),
        ((1, 4000), "resized 1x4000 -> 128x512000 and centre-cropped to 128x128"),
    ],
)
def test_fitting_is_said(size, note):
    fitted, said = fit(Image.new("RGB", size, (9, 99, 199)), (128, 128))
    assert fitted.size == (128, 128) and said == note
    assert fitted.getextrema() == ((9, 9), (99, 99), (199, 199))


def test_a_mere_crop_does_not_blur():
    assert np.array_equal(fit(Image.fromarray(PHOTO), (24, 15))[0], PHOTO[:, 2:17])
    assert np.array_equal(fit(Image.fromarray(PHOTO), (7, 20))[0], PHOTO[8:15])


def test_a_thumbnail_is_a_small_jpeg(tmp_path):
    Image.new("RGBA", (300, 100), (200, 10, 10, 255)).save(tmp_path / "a.png")
    with Image.open(io.BytesIO(thumbnail(tmp_path / "a.png", 60))) as small:
        assert (small.format, small.size, small.mode) == ("JPEG", (60, 20), "RGB")


def test_fitting_equals_resizing_and_then_cropping():
    image = Image.fromarray(PHOTO).resize((60, 40), Image.Resampling.BICUBIC)
    expected = np.asarray(image.resize((48, 32), Image.Resampling.LANCZOS))[:, 8:40].astype(int)
    assert np.abs(np.asarray(fit(image, (32, 32))[0]) - expected)[:, 4:-4].max() <= 1


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(1, 300)] * 2), st.tuples(*[st.integers(1, 64)] * 2))
def test_fitting_always_gives_the_size_and_keeps_a_flat_colour(size, target):
    fitted, note = fit(Image.new("RGB", size, (1, 2, 3)), target)
    assert fitted.size == target[::-1] and (note is None) == (size == target[::-1])
    assert fitted.getextrema() == ((1, 1), (2, 2), (3, 3))


def test_sizes_of_nothing_are_refused():
    for size, target in (((0, 5), (4, 4)), ((5, 5), (0, 4))):
        with pytest.raises(ValueError, match="at least 1"):
            fit(Image.new("RGB", size), target)


def test_arrays_and_images_are_inverses():
    array = to_array(Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], -1)))
    assert array.dtype == np.float32 and array.shape == (3, 16, 16)
    assert array.min() == -1 and array.max() == 1
    assert np.array_equal(from_array(array), np.stack([RAMP, RAMP.T, 255 - RAMP], -1))
    assert np.array_equal(to_array(Image.fromarray(PHOTO))[2], PHOTO[..., 2] / np.float32(127.5) - 1)


def test_arrays_are_rounded_and_clipped():
    values = np.array([-np.inf, -3, -1, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1, 1.2, np.inf])
    image = from_array(np.broadcast_to(values, (3, 2, 8)))
    assert image.mode == "RGB" and np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 0, 1, 255, 255, 255]


@pytest.mark.parametrize("array", [np.zeros((8, 8, 3)), np.zeros((1, 3, 8, 8)), np.full((3, 2, 2), np.nan)])
def test_arrays_that_are_no_images_are_refused(array):
    with pytest.raises(ValueError, match="an image"):
        from_array(array)


def test_samples(photo):
    assert read_sample(photo, (24, 20)).id == str(photo)
    sample = read_sample(photo, (8, 8), id="a")
    assert (sample.id, sample.image.size) == ("a", (8, 8))
    assert sample.notes == ("resized 20x24 -> 8x10 and centre-cropped to 8x8",)
    assert Sample("x", sample.image) == Sample(id="x", image=sample.image, notes=())


# -- writing -----------------------------------------------------------------------------------------


def test_pngs_are_written_whole_with_their_text(tmp_path):
    path = tmp_path / "new" / "x.png"
    save_png(Image.fromarray(PHOTO), path, prompt="grüner See", seed=3, title="湖")
    assert np.array_equal(pixels(path), PHOTO) and os.listdir(path.parent) == ["x.png"]
    with Image.open(path) as image:
        assert image.text == {"Software": "ringmark", "prompt": "grüner See", "seed": "3", "title": "湖"}
    assert is_ours(path)
    save_png(Image.fromarray(PHOTO), path, signed=False)
    assert not is_ours(path)
    for mode, name in (("HSV", "x"), ("RGB", "y" * 80), ("RGB", "湖")):
        with pytest.raises((OSError, ValueError)):
            save_png(Image.new(mode, (4, 4)), path, **{name: "text"})
    assert np.array_equal(pixels(path), PHOTO) and os.listdir(path.parent) == ["x.png"]


def test_a_picture_of_pillows_is_taken_as_if_it_had_been_saved(tmp_path):
    """Alpha over white, turned by its EXIF, deep pixels scaled: the same from memory and from a file."""
    rng = np.random.default_rng(0)
    translucent = Image.fromarray(rng.integers(0, 256, (40, 32, 4), np.uint8), "RGBA")
    turned = Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8))
    turned.getexif()[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 65536, (40, 40), np.uint16))
    for i, picture in enumerate((translucent, turned, deep)):
        path = tmp_path / f"{i}.png"
        picture.save(path, exif=picture.getexif())
        saved = read_sample(path, (32, 32))
        with Image.open(path) as opened:
            (shown,) = samples_of(opened, lambda _: [(32, 32)], id="image 0")
        assert np.array_equal(np.asarray(saved.image), np.asarray(shown.image)) and shown.notes == saved.notes


def test_a_picture_of_pillows_that_is_cut_off_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    with Image.open(io.BytesIO(buffer.getvalue()[:500])) as picture, pytest.raises(ImageError) as caught:
        samples_of(picture, lambda _: [(32, 32)], id="image 3")
    assert caught.value.code == "image.damaged" and str(caught.value).startswith("image 3:")
