"""Images to train on: .npz files and folders."""

from __future__ import annotations

import io
import itertools
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmfast.data import open_data
from tests.hostile.files import BOMB, Payload, archive, deflated, flipped, kind, opens, written

PIXELS = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)


def npy(descr: str = "|u1", shape: Any = (4, 8, 8, 3), data: bytes | None = None, text: str | None = None) -> bytes:
    """A .npy file whose header says anything."""
    header = text or repr({"descr": descr, "fortran_order": False, "shape": shape})
    encoded = header.encode() + b"\n"
    start = b"\x93NUMPY" + (b"\x01\0" + struct.pack("<H", len(encoded)) if len(encoded) < 2**16 else
                            b"\x02\0" + struct.pack("<I", len(encoded)))  # fmt: skip
    return start + encoded + (PIXELS.tobytes() if data is None else data)


for what, members, said in [
    ("a header that claims more", {"x": npy(shape=(10**12, 8, 8, 3))}, r"the header of x says .* and there are 768"),
    ("a header that claims less", {"x": npy(shape=(2, 8, 8, 3))}, "the header of x says"),
    ("a negative shape", {"x": npy(shape=(-4, 8, 8, -3))}, "the header of x says"),
    ("a shape of fractions", {"x": npy(shape=(4.0, 8, 8, 3))}, "shape"),
    ("a shape that is code", {"x": npy(text="{'descr': '|u1', 'fortran_order': False, 'shape': exit()}")}, "bad.npz: "),
    ("a header that is no header", {"x": npy(text="hello")}, "bad.npz: "),
    ("a deep header", {"x": npy(text="(" * 5000)}, "bad.npz: "),
    ("a header of signs", {"x": npy(text="-" * 9000 + "1")}, "bad.npz: "),
    ("a long header", {"x": npy(text="{" + " " * 70_000 + "}")}, "the header of x has 70,0"),
    ("an unknown type", {"x": npy("evil")}, "bad.npz: "),
    ("an unknown format", {"x": PIXELS.tobytes()[:6].join([b"\x93NUMPY\x09\0", bytes(90)])}, "format 9.0"),
    ("no array", {"x": b"hello world, no array"}, "x is no array: it begins with b'hello"),
    ("an empty array", {"x": b""}, "x is no array"),
    ("numbers of another kind", {"x": npy("<i8", (4, 8, 3))}, "uint8, or floating point"),
    ("channels first", {"x": npy(shape=(4, 3, 8, 8))}, "with 1 or 3 channels C"),
    ("images without height", {"x": npy(shape=(2**40, 0, 8, 3), data=b"")}, "with 1 or 3 channels C"),
    ("a label that needs a huge network", {"x": npy(), "y": npy("<i8", (4,), struct.pack("<4q", 0, 1, 2, 2**62))},
     "labels must be below 1,000,000, got 4611686018427387904 for image 3"),
    ("a negative label", {"x": npy(), "y": npy("<i8", (4,), struct.pack("<4q", 0, 1, 2, -1))}, "labels must be 0"),
    ("labels of another number", {"x": npy(), "y": npy("<i8", (3,), bytes(24))}, r"int64 \[4\]"),
]:  # fmt: skip

    @kind(f"npz: {what}", said)
    def _(folder, canary, members=members):
        return archive(folder / "bad.npz", {f"{name}.npy": content for name, content in members.items()})


for what, content in {"empty": b"", "text": b"hello", "start of a zip": b"PK\x03\x04" * 20, "one array": npy()}.items():
    kind(f"npz: {what}", "is no .npz file")(written("bad.npz", content))


@kind("npz: hostile pickle", "holds Python objects, which are not loaded")
def _(folder, canary):
    np.savez(folder / "bad.npz", x=np.array([Payload(canary)] * 4))
    return folder / "bad.npz"


@kind("npz: hostile pickle for labels", "holds Python objects, which are not loaded")
def _(folder, canary):
    np.savez(folder / "bad.npz", x=PIXELS, y=np.array([Payload(canary)] * 4))
    return folder / "bad.npz"


@kind("npz: a pipe", "bad.npz is no regular file")
def _(folder, canary):
    os.mkfifo(folder / "bad.npz")
    return folder / "bad.npz"


@kind("npz: an array without its suffix", "there is no x.npy in it")
def _(folder, canary):
    return archive(folder / "bad.npz", {"x": npy()})


@kind("npz: cut short", "is no .npz file")
def _(folder, canary):
    np.savez_compressed(folder / "bad.npz", PIXELS)
    (folder / "bad.npz").write_bytes((folder / "bad.npz").read_bytes()[:300])
    return folder / "bad.npz"


@kind("npz: a bit flipped", "bad.npz: ")
def _(folder, canary):
    np.savez_compressed(folder / "bad.npz", PIXELS)
    (folder / "bad.npz").write_bytes(flipped((folder / "bad.npz").read_bytes(), 250))
    return folder / "bad.npz"


for what, at, value, said in [("encrypted", 8, 1, "encrypted"), ("an unknown compression", 10, 77, "compression")]:

    @kind(f"npz: {what}", said)
    def _(folder, canary, at=at, value=value):
        path = archive(folder / "bad.npz", {"x.npy": npy()})
        content = bytearray(path.read_bytes())
        struct.pack_into("<H", content, content.index(b"PK\x01\x02") + at, value)
        struct.pack_into("<H", content, at - 2, value)
        path.write_bytes(content)
        return path


@kind("npz: a member said to be larger than the file", "is said to have|Overlapped entries")
def _(folder, canary):
    path = archive(folder / "bad.npz", {"x.npy": npy(shape=(2**20, 8, 8, 3))})
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    size = 2**20 * 192 + struct.unpack_from("<I", content, at + 24)[0] - PIXELS.nbytes
    struct.pack_into("<II", content, at + 20, size, size)
    path.write_bytes(content)
    return path


def bomb(descr: str, row: tuple[int, ...]) -> tuple[bytes, int]:
    """A compressed array of zeros."""
    item = int(np.prod(row, dtype=int)) * np.dtype(descr).itemsize
    start = max(item, 128)
    text = repr({"descr": descr, "fortran_order": False, "shape": ((BOMB - start) // item, *row)}).encode()
    header = b"\x93NUMPY\x01\0" + struct.pack("<H", start - 10) + text.ljust(start - 11) + b"\n"
    return deflated(BOMB, header), BOMB


@kind("npz: bomb of images", "arr_0 would become 2,1", bomb=True)
def _(folder, canary):
    return archive(folder / "bad.npz", {"arr_0.npy": bomb("|u1", (64, 64, 1))})


@kind("npz: bomb of labels", "y would become 2,1", bomb=True)
def _(folder, canary):
    return archive(folder / "bad.npz", {"x.npy": npy(), "y.npy": bomb("<i8", ())})


@kind("npz: bomb for a header", "the header of x has 2,", bomb=True)
def _(folder, canary):
    start = b"\x93NUMPY\x02\0" + struct.pack("<I", BOMB - 12)
    return archive(folder / "bad.npz", {"x.npy": (deflated(BOMB, start), BOMB)})


@kind("npz: bomb that is no array", "x is no array", bomb=True)
def _(folder, canary):
    return archive(folder / "bad.npz", {"x.npy": (deflated(BOMB), BOMB)})


def image(format: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


JPEG, WEBP, GIF = image("JPEG"), image("WEBP"), image("GIF")
SOF = JPEG.index(b"\xff\xc0") + 5
for what, name, content in [
    ("empty", "x.png", b""),
    ("text", "x.png", b"no image"),
    ("PNG without its end", "x.png", image()[:-40]),
    ("PNG with a byte changed", "x.png", flipped(image(), 70)),
    ("PNG without size", "x.png", png(0, 8, zlib.compress(b""))),
    ("JPEG without its end", "x.jpg", JPEG[:200]),
    ("JPEG with a start alone", "x.jpg", b"\xff\xd8\xff\xe0"),
    ("WebP without its end", "x.webp", WEBP[:40]),
    ("GIF with a start alone", "x.gif", b"GIF89a"),
    ("BMP with a start alone", "x.bmp", b"BM" + bytes(20)),
    ("TIFF called PNG", "x.png", image("TIFF")),
    ("PostScript called PNG", "x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"),
]:
    kind(f"images: {what}", rf"{name}( \(| cannot be read: )")(written(f"images/{name}", content))
for what, name, content in [
    ("PNG of 2,500,000,000 pixels", "x.png", png(50_000, 50_000, zlib.compress(bytes(10**6)))),
    ("JPEG of 4,000,000,000 pixels", "x.jpg", JPEG[:SOF] + struct.pack(">HH", 65_000, 65_000) + JPEG[SOF + 4 :]),
    ("GIF of 4,000,000,000 pixels", "x.gif", GIF[:6] + struct.pack("<HH", 65_000, 65_000) + GIF[10:]),
]:
    kind(f"images: {what}", rf"{name} \(.*exceeds limit", bomb=True)(written(f"images/{name}", content))


@kind("images: a PNG that becomes large", "exceeds limit", bomb=True)
def _(folder, canary):
    """Its header is right: black, to the last pixel but some."""
    data = b"\x78\x9c" + deflated(BOMB) + b"\0\0\0\0"
    return written("images/x.png", png(26_754, 26_754, data))(folder, canary)


@kind("images: a sparse file", "x.png .a file of", bomb=True)
def _(folder, canary):
    (folder / "images" / "x.png").write_bytes(image())
    os.truncate(folder / "images" / "x.png", 2**33)
    return folder / "images" / "x.png"


@kind("images: a link to nothing", r"x.png \(a link to nothing\)")
def _(folder, canary):
    (folder / "images" / "x.png").symlink_to(folder / "nowhere.png")
    return folder / "images" / "x.png"


@kind("images: a link to itself", r"x.png \(a link to nothing\)")
def _(folder, canary):
    (folder / "images" / "x.png").symlink_to("x.png")
    return folder / "images" / "x.png"


@kind("images: a pipe", r"x.png \(no file\)")
def _(folder, canary):
    os.mkfifo(folder / "images" / "x.png")
    return folder / "images" / "x.png"


@kind("images: a link to the folder around it", "again is a link to .*, in which it lies itself")
def _(folder, canary):
    (folder / "images" / "deep").mkdir()
    (folder / "images" / "deep" / "again").symlink_to(folder / "images")
    return folder / "images" / "x.png"


@kind("images: two links to each other's folders", "is a link to .*, in which it lies itself")
def _(folder, canary):
    for one, other in itertools.permutations("ab"):
        (folder / "images" / one).mkdir(exist_ok=True)
        (folder / "images" / one / "link").symlink_to(folder / "images" / other)
    return folder / "images" / "x.png"


@opens("npz", "images")
def read_images(path: Path) -> object:
    source = path if path.suffix == ".npz" else path.parent
    opened = open_data(source)
    return list(itertools.islice(opened.batches(len(opened), seed=0), 1))
