"""Structure of PNG, JPEG and WebP files, read without decoding pixels."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Damaged", "Jpeg", "Png", "TooMany", "kind_of", "png_chunks", "png_size", "webp_size"]

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_INFLATION = 1032  # largest expansion factor of zlib
MAX_PROFILE = 4 << 20
MAX_METADATA = 1 << 16
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Passes of an interlaced PNG: first column, first row, steps between columns and between rows."""

JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # marker after pixel data, not a stuffed 0 or a restart
JPEG_RESTART = re.compile(rb"\xff+[\xd0-\xd7]")
JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PAD = bytes.fromhex("3a91c55e2db7746a8d139bd264e95a35")


class Damaged(ValueError):
    """A damaged or truncated file, with the reason."""


class TooMany(ValueError):
    """A file with more parts than any valid picture has."""


def kind_of(head: bytes) -> str | None:
    """Pillow's name of the format of a file that begins with these bytes (16 are enough); None if unsupported."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
        return "AVIF"
    magics = {
        PNG_MAGIC: "PNG",
        b"\xff\xd8\xff": "JPEG",
        b"GIF87a": "GIF",
        b"GIF89a": "GIF",
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"II+\0": "TIFF",
        b"MM\0+": "TIFF",
        **{b"P" + letter: "PPM" for letter in (b"1", b"2", b"3", b"4", b"5", b"6", b"F", b"f")},
    }
    return next((kind for magic, kind in magics.items() if head.startswith(magic)), None)


# -- PNG --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Png:
    """The parts of a PNG: sizes, number of frames, colour profile and pixel data.

    `data` holds all IDAT chunks, which must inflate to `raw_bytes`; `header` holds the signature and the other relevant
    chunks: size, palette, transparency, orientation.
    """

    width: int
    height: int
    frames: int
    data: bytes
    raw_bytes: int
    header: bytes
    profile: bytes | None

    @classmethod
    def parse(cls, content: bytes, max_chunks: int) -> Png:
        """Read the chunks.

        Raises Damaged for a wrong checksum, a truncated chunk or too little data, and TooMany for more than
        `max_chunks`. Text, later frames and all colour management except the profile are skipped, whatever their size.
        """
        width, height, layout = _png_header(content)
        kept, data, frames, profile = [PNG_MAGIC], [], 1, None
        for kind, start, length in png_chunks(content, max_chunks):
            if kind == b"IDAT":
                data.append(_checked_chunk(content, start, length))
            elif kind in (b"IHDR", b"PLTE", b"tRNS"):
                kept.append(_chunk(kind, _checked_chunk(content, start, length)))
            elif kind == b"acTL":
                frames = int.from_bytes(content[start : start + 4], "big")
            elif kind == b"iCCP":
                profile = _png_profile(content[start : start + length])
            elif length <= MAX_METADATA and _has_orientation(kind, content[start : start + length]):
                kept.append(_chunk(kind, content[start : start + length]))
        raw_bytes = _raw_bytes(width, height, layout)
        if raw_bytes > MAX_INFLATION * (sum(map(len, data)) + 1):
            raise Damaged(f"the data cannot hold {width} x {height} pixels")
        return cls(
            width=width,
            height=height,
            frames=frames,
            data=b"".join(data),
            raw_bytes=raw_bytes,
            header=b"".join(kept),
            profile=profile,
        )

    @property
    def pixels(self) -> bytes:
        """A PNG with the same pixels and minimal metadata."""
        return self.header + _chunk(b"IDAT", self.data) + _chunk(b"IEND", b"")

    def check_whole(self) -> None:
        """Raise Damaged unless the data inflates to the number of bytes required by the size (unchecked by Pillow)."""
        inflate, left, piece = zlib.decompressobj(), self.raw_bytes, self.data
        try:
            while left > 0 and not inflate.eof:
                out = inflate.decompress(piece, 1 << 20)
                left, piece = left - len(out), inflate.unconsumed_tail
                if not out and not piece:
                    break
        except zlib.error as error:
            raise Damaged(str(error)) from error
        if left > 0:
            raise Damaged(f"{left} bytes of pixels are missing")


def _png_header(content: bytes) -> tuple[int, int, bytes]:
    """Width, height and the other five bytes of the header."""
    if content[8:16] != b"\0\0\0\rIHDR" or len(content) < 33:
        raise Damaged("missing PNG header")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big"), content[24:29]


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height from the header."""
    return _png_header(content)[:2]


def png_chunks(content: bytes, max_chunks: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and length of each chunk before IEND. Raises TooMany for more than `max_chunks`."""
    at, chunks = 8, 0
    while at + 8 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if kind == b"IEND":
            return
        chunks += 1
        if chunks > max_chunks:
            raise TooMany(f"more than {max_chunks} chunks")
        yield kind, at + 8, length
        at += 12 + length


def _checked_chunk(content: bytes, start: int, length: int) -> bytes:
    body, stored = content[start : start + length], content[start + length : start + length + 4]
    kind = content[start - 4 : start]
    if len(stored) != 4:
        raise Damaged(f"cut off in the chunk {kind.decode()}")
    if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(stored, "big"):
        raise Damaged(f"the checksum of the chunk {kind.decode()} is wrong")
    return body


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big")


def _has_orientation(kind: bytes, body: bytes) -> bool:
    """Whether a chunk is EXIF, or XMP that is not compressed."""
    return kind == b"eXIf" or (kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0\0"))


def _png_profile(body: bytes) -> bytes:
    """The profile in an iCCP chunk; empty if it is damaged or too large."""
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(body[body.find(b"\0") + 2 :], MAX_PROFILE)
    except zlib.error:
        return b""
    return profile if inflate.eof else b""


def _raw_bytes(width: int, height: int, layout: bytes) -> int:
    """Number of bytes before compression; 0 for an invalid layout, which Pillow refuses."""
    depth, colour, _, _, interlaced = layout
    bits = depth * PNG_CHANNELS.get(colour, 0)
    if not interlaced:
        return height * (1 + (width * bits + 7) // 8)
    total = 0
    for left, top, across, down in ADAM7:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return total


# -- JPEG -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jpeg:
    """The structure of a JPEG: sizes, first kind of frame (SOF marker), restarts, and positions of pixel data."""

    width: int
    height: int
    frame: int
    restarts: bool
    scans: tuple[tuple[int, int], ...]  # start and end of the pixel data of each

    @classmethod
    def parse(cls, content: bytes, max_segments: int) -> Jpeg:
        """Read the segments up to the end of the image.

        Raises Damaged if there is no size, scan or end, and TooMany for more than `max_segments`.
        """
        sizes, scans, restarts, segments, at = [], [], False, 0, 2
        while (at := content.find(b"\xff", at)) >= 0 and at + 4 <= len(content):
            marker = content[at + 1]
            if marker == 0xD9:
                break
            if marker == 0xFF:
                at += 1
                continue
            if marker <= 0x01 or 0xD0 <= marker <= 0xD8:
                at += 2
                continue
            start, segments = at + 2, segments + 1
            if segments > max_segments:
                raise TooMany(f"more than {max_segments} segments")
            at = start + int.from_bytes(content[start : start + 2], "big")
            if marker in JPEG_SIZES:
                sizes.append((marker, content[start + 3 : start + 7]))
            elif marker == 0xDD:
                restarts = True
            elif marker == 0xDA:
                match = JPEG_MARKER.search(content, at)
                if not match:
                    raise Damaged("no end of the image")
                scans.append((at, match.start()))
                at = match.start()
        if not sizes or not scans or content[at : at + 2] != b"\xff\xd9":
            raise Damaged("no end of the image" if sizes and scans else "no pixels")
        frame, size = sizes[0]
        return cls(
            width=int.from_bytes(size[2:], "big"),
            height=int.from_bytes(size[:2], "big"),
            frame=frame,
            restarts=restarts,
            scans=tuple(scans),
        )

    @property
    def checkable(self) -> bool:
        """Whether `padded` reveals missing data, which it does not with arithmetic coding."""
        return self.frame <= 0xC7

    def padded(self, content: bytes) -> bytes:
        """The same JPEG with more bytes at the end of each run of pixel data.

        If all pixels of a run are there, the decoder skips the padding and the picture stays the same. If some are
        missing, the decoder reads the padding as pixels instead of silently filling with grey, and the picture changes.
        """
        pieces, done = [], 0
        for start, end in self.scans:
            while end > start and content[end - 1] == 0xFF:  # fill bytes belong to the marker
                end -= 1
            run = content[start:end]
            pieces += [content[done:start], JPEG_RESTART.sub(_pad_before, run) if self.restarts else run, PAD]
            done = end
        return b"".join([*pieces, content[done:]])


def _pad_before(marker: re.Match[bytes]) -> bytes:
    return PAD + marker[0]


# -- WebP -------------------------------------------------------------------------------------------------------------


def webp_size(content: bytes) -> tuple[int, int]:
    """Width and height from a WebP's first chunk; raises Damaged if it is not an image."""
    kind, body = content[12:16], content[20:30]
    if len(body) == 10 and kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if len(body) == 10 and kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if len(body) == 10 and kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise Damaged("missing WebP header")
