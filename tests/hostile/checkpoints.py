"""Checkpoints: of torch.save, and of safetensors."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import cmfast
from tests.checkpoint_utils import ASKED
from tests.golden_utils import small_unet
from tests.hostile.files import BOMB, Payload, archive, deflated, flipped, kind, opens, repacked, written


def saved(folder: Path, content: Any = None, **options: Any) -> Path:
    torch.save(small_unet(num_classes=10).state_dict() if content is None else content, folder / "model.pt", **options)
    return folder / "model.pt"


def changed(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    tensors = small_unet(num_classes=10).state_dict()
    return saved(folder, tensors | {"out.2.weight": change(tensors["out.2.weight"])})


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1\n"
for what, content in {
    "empty": b"", "web page": b"<!DOCTYPE html><html>", "git lfs": LFS, "start of a zip": b"PK\x03\x04" * 20,
    "deep pickle": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "long text in a pickle": b"\x80\x02X\xff\xff\xff\x7f", "stack underflow": b"\x80\x02" + b"a" * 100 + b".",
}.items():  # fmt: skip
    kind(f"pt: {what}", "is empty|damaged|pickled")(written("model.pt", content))

for what, change, said in [
    ("integer weights", lambda t: t.to(torch.int32), "out.2.weight is torch.int32, expected one of"),
    ("complex weights", lambda t: t.to(torch.complex64), "out.2.weight is torch.complex64"),
    ("boolean weights", lambda t: t > 0, "out.2.weight is torch.bool"),
    ("sparse weights", lambda t: t.to_sparse(), "out.2.weight is no plain tensor"),
    ("weights without values", lambda t: t.to("meta"), "out.2.weight is no plain tensor"),
    ("wrong shape", lambda t: t[:, :5].clone(), r"out.2.weight: \[3, 5, 3, 3\] in the file"),
    ("one number as a matrix", lambda t: torch.zeros(1).expand(4096, 4096, 3, 3), "some are views of .* with .clone"),
]:
    kind(f"pt: {what}", said)(lambda folder, canary, change=change: changed(folder, change))


@kind("pt: the same numbers by many names", "some are views of the same numbers")
def _(folder, canary):
    x = torch.zeros(2**20)
    return saved(folder, {str(i): x for i in range(3)})


@kind("pt: hostile pickle", "could run any code")
def _(folder, canary):
    return saved(folder, {"model": Payload(canary)})


@kind("pt: hostile pickle in the old format", "could run any code")
def _(folder, canary):
    return saved(folder, {"model": Payload(canary)}, _use_new_zipfile_serialization=False)


@kind("pt: hostile pickle without torch", "damaged|could run any code")
def _(folder, canary):
    return written("model.pt", pickle.dumps(Payload(canary)))(folder, canary)


@kind("pt: hostile pickle among weights", "could run any code")
def _(folder, canary):
    return saved(folder, small_unet().state_dict() | {"more": [{"deep": Payload(canary)}]})


@kind("pt: hostile pickle in an archive of other names", "damaged|could run any code")
def _(folder, canary):
    return archive(folder / "model.pt", {"a/data.pkl": pickle.dumps(Payload(canary), 2), "a/version": b"3"})


@kind("pt: eval by name", "could run any code")
def _(folder, canary):
    code = f"__import__('os').mkdir({str(canary)!r})".encode()
    pickled = b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", len(code)) + code + b"\x85R."
    return archive(folder / "model.pt", {"a/data.pkl": pickled, "a/version": b"3", "a/byteorder": b"little"})


@kind("pt: a whole model", "could run any code")
def _(folder, canary):
    return saved(folder, small_unet())


@kind("pt: cut short", "damaged")
def _(folder, canary):
    path = saved(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@kind("pt: a bit flipped in the directory", "damaged")
def _(folder, canary):
    path = saved(folder)
    path.write_bytes(flipped(path.read_bytes(), -20))
    return path


@kind("pt: a pickle with a byte changed", "damaged|not a state dict|missing|could run any code")
def _(folder, canary):
    return repacked(saved(folder), lambda name, x: flipped(x, 40) if name.endswith("data.pkl") else x)


@kind("pt: a pickle cut short", "damaged")
def _(folder, canary):
    return repacked(saved(folder), lambda name, x: x[:-50] if name.endswith("data.pkl") else x)


@kind("pt: no pickle", "damaged")
def _(folder, canary):
    return repacked(saved(folder), lambda name, x: None if name.endswith("data.pkl") else x)


@kind("pt: a tensor's numbers missing", "damaged")
def _(folder, canary):
    return repacked(saved(folder), lambda name, x: None if name.endswith("data/0") else x)


@kind("pt: the last tensor's numbers cut short", "damaged|take .* bytes")
def _(folder, canary):
    path = folder / "model.pt"
    torch.save({"weight": torch.zeros(2**16)}, path)
    return repacked(path, lambda name, x: x[:8] if name.endswith("data/0") else x)


@kind("pt: compressed", "in it is compressed")
def _(folder, canary):
    return repacked(saved(folder), lambda name, x: x, zipfile.ZIP_DEFLATED)


@kind("pt: bomb for a pickle", "in it is compressed", bomb=True)
def _(folder, canary):
    return archive(folder / "model.pt", {"a/data.pkl": (deflated(BOMB), BOMB), "a/version": b"3"})


@kind("pt: numbers for names", "0 is no tensor|not a state dict")
def _(folder, canary):
    return saved(folder, {0: torch.ones(2)})


@kind("pt: a list", "holds a list")
def _(folder, canary):
    return saved(folder, [1, 2])


@kind("pt: a tar file", "damaged")
def _(folder, canary):
    with tarfile.open(folder / "model.pt", "w") as file:
        info = tarfile.TarInfo("pickle")
        info.size = len(pickle.dumps(Payload(canary)))
        file.addfile(info, io.BytesIO(pickle.dumps(Payload(canary))))
    return folder / "model.pt"


@kind("pt: a pipe", "no regular file")
def _(folder, canary):
    os.mkfifo(folder / "model.pt")
    return folder / "model.pt"


@kind("pt: a link to itself", "no such checkpoint", FileNotFoundError)
def _(folder, canary):
    os.symlink(folder / "model.pt", folder / "model.pt")
    return folder / "model.pt"


def raw(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


for what, content in {
    "empty": b"",
    "cut short": raw({"a": entry()}, bytes(3)),
    "a header of 2^63 bytes": raw({"a": entry()}, bytes(8), 2**63),
    "a header beyond the file": raw({"a": entry()}, bytes(8), 5000),
    "a header that is no JSON": raw(b'{"a": [}'),
    "a deep header": raw(b'{"a":' + b"[" * 50_000),
    "overlapping tensors": raw({"a": entry(), "b": entry()}, bytes(8)),
    "a gap between tensors": raw({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "offsets beyond the file": raw({"a": entry(offsets=(0, 2**40), shape=(2**38,))}, bytes(8)),
    "offsets backwards": raw({"a": entry(offsets=(8, 0))}, bytes(8)),
    "a shape of other size": raw({"a": entry(shape=(3,))}, bytes(8)),
    "a negative shape": raw({"a": entry(shape=(-2,))}, bytes(8)),
    "a shape that overflows": raw({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
    "an unknown dtype": raw({"a": entry("F17")}, bytes(8)),
    "one name twice": raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "a pickle": pickle.dumps({"a": 1}),
}.items():
    kind(f"safetensors: {what}", "is empty|damaged|not the weights")(written("model.safetensors", content))


@kind("safetensors: a header of a gigabyte", "damaged", bomb=True)
def _(folder, canary):
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**30) + b"{")
        file.truncate(2**30 + 8)
    return folder / "model.safetensors"


@kind("safetensors: integer weights", "out.2.bias is torch.int64")
def _(folder, canary):
    tensors = small_unet().state_dict()
    save_file(tensors | {"out.2.bias": torch.zeros(3, dtype=torch.int64)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def described(change: Callable[[dict], Any]) -> Callable[[Path, Path], Path]:
    """A file of `cmfast.save` with its settings changed."""

    def make(folder: Path, canary: Path) -> Path:
        from safetensors import safe_open

        path = folder / "model.safetensors"
        cmfast.save(cmfast.Denoiser(small_unet()), path)
        with safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()["cmfast"])
        made = change(settings)
        save_file(small_unet().state_dict(), path, {"cmfast": made if isinstance(made, str) else json.dumps(made)})
        return path

    return make


def network(**changes: Any) -> Callable[[dict], dict]:
    return lambda settings: settings | {"network": settings["network"] | changes}


for what, change, said in [
    ("sigma_data is text", lambda s: s | {"sigma_data": "0.5"}, "sigma_data is '0.5', expected a number"),
    ("sigma_data is negative", lambda s: s | {"sigma_data": -1}, "sigma_data must be positive"),
    ("sigma_min is NaN", lambda s: s | {"sigma_min": float("nan")}, "sigma_min is nan"),
    ("sigma_max is below sigma_min", lambda s: s | {"sigma_max": 0.001}, "need 0 < sigma_min < sigma_max"),
    ("rho is a list", lambda s: s | {"rho": [7]}, "rho is list"),
    ("image_shape is a number", lambda s: s | {"image_shape": 3}, "image_shape is 3"),
    ("image_shape is long", lambda s: s | {"image_shape": [1] * 9}, "image_shape is .*, expected channels and sizes"),
    ("bounded is a number", lambda s: s | {"bounded": 0}, "bounded is 0, expected true or false"),
    ("num_classes is text", lambda s: s | {"num_classes": "10"}, "num_classes is '10'"),
    ("a dtype that is a function", lambda s: s | {"dtype": "load"}, "damaged"),
    ("a version that is text", lambda s: s | {"version": "1"}, "damaged"),
    ("settings that are deep", lambda s: "[" * 100_000, "damaged"),
    ("settings that are a list", lambda s: [s], "damaged"),
    ("no network", lambda s: s | {"network": None}, "damaged"),
    ("image_size is negative", network(image_size=-5), "image_size is -5"),
    ("model_channels is 10^18", network(model_channels=10**18), "model_channels is 1000000000000000000"),
    ("model_channels is text", network(model_channels="32"), "model_channels is '32'"),
    ("num_heads is a fraction", network(num_heads=1.5), "num_heads is 1.5"),
    ("channel_mult is infinite", network(channel_mult=[float("inf")]), "model.safetensors: "),
    ("channel_mult is a word", network(channel_mult="1234"), "channel_mult is '1234'"),
    ("dropout is text", network(dropout="x"), "model.safetensors: "),
    ("an argument that there is not", network(width=1), "width"),
]:
    kind(f"safetensors: {what}", said)(described(change))
for what, change in [
    ("blocks without number", network(num_res_blocks=10**7)),
    ("levels without number", network(channel_mult=[1] * 10**6, num_res_blocks=1000)),
]:
    kind(f"safetensors: {what}", "blocks, and there are|expected a list", bomb=True)(described(change))


@opens("pt", "safetensors")
def load(path: Path) -> object:
    """A file of `cmfast.save` knows its arguments; another is asked for them."""
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            if b"__metadata__" in file.read(1000):
                return cmfast.load(path)
    return cmfast.load(path, **ASKED)
