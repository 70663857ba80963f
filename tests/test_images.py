"""Every file is read to the right pixels, with what was done said, or refused in one line that says why."""

from __future__ import annotations

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from ringmark.data import decode
from ringmark.data.files import is_ours, one_line
from ringmark.data.images import Sample, fit, from_array, read_image, read_sample, save_png, to_array
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
    seen = pixels(path, "16 bit reduced to 8", "alpha over white")
    assert (seen[RAMP == 7] == 255).all() and (seen[RAMP == 6] == 6).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    assert np.array_equal(pixels(path, "16 bit reduced to 8")[..., 0], RAMP)


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
    assert pixels(path, "16 bit reduced to 8").tolist() == [[[0x12, 255, 0]]]


@pytest.mark.parametrize(("values", "white"), [([0, 0.2, 1], 1), ([0, 51, 255], 255), ([0, 13107, 65535], 65535)])
def test_floats_are_scaled_from_the_range_they_use(tmp_path, values, white):
    path = tmp_path / "x.tif"
    Image.fromarray(np.float32([values])).save(path)
    assert pixels(path, f"32 bit reduced to 8, 0 to {white} taken as black to white")[0, :, 0].tolist() == [0, 51, 255]


def test_unusual_ranges_are_stretched_and_flat_ones_survive(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.int32([[-100, 0, 155]])).save(path)
    assert pixels(path, "32 bit reduced to 8, -100 to 155 taken as black to white")[0, :, 0].tolist() == [0, 100, 255]
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
    seen = pixels(path, *(["turned by its EXIF orientation"] if orientation > 1 else []))
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
    assert str(caught.value) == f"{tmp_path}/a\\nb.png: there is no such file"


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
    sample = read_sample(photo, (8, 8), id="a", label=True, prompt="lake")
    assert (sample.id, sample.label, sample.prompt, sample.image.size) == ("a", True, "lake", (8, 8))
    assert sample.notes == ("resized 20x24 -> 8x10 and centre-cropped to 8x8",)
    assert Sample("x", sample.image) == Sample("x", sample.image, None, "", ())


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
