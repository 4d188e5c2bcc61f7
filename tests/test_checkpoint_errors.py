"""Files that cannot be loaded, and what the user is told."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cmfast import checkpoint
from cmfast.checkpoint import CheckpointError, load, load_teacher, save
from cmfast.denoiser import Denoiser
from tests.checkpoint_utils import ASKED, same_bits
from tests.golden_utils import small_unet


@pytest.fixture
def pt_file(tmp_path):
    """A checkpoint as the original writes it: a state dict."""
    path = tmp_path / "model.pt"
    torch.save(small_unet(num_classes=10).state_dict(), path)
    return path


def test_missing_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*nothing.pt"):
        load(tmp_path / "nothing.pt")
    for address in ("https://host.org/models/model.pt", "gs://bucket/model.pt"):
        with pytest.raises(FileNotFoundError, match=f"^{address} is an address, not a file: download it first"):
            load(address)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download openai/diffusers-cd --local-dir diffusers-cd$"):
        load("openai/diffusers-cd")
    (tmp_path / "runs").mkdir()
    for here in ("runs/cd", "cd/model.pt", "cd"):
        with pytest.raises(FileNotFoundError, match=f"^no such checkpoint: {here}$"):
            load(here)
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "mnist.safetensors")
    with pytest.raises(FileNotFoundError, match="bundled model is missing"):
        load()
    save(Denoiser(small_unet()), tmp_path / "mnist.safetensors")
    assert same_bits(load().network, small_unet())


def test_what_shapes_do_not_show_is_asked_for(pt_file):
    with pytest.raises(CheckpointError, match="image_size= and num_head_channels= .*published.*pass them by name"):
        load(pt_file)
    with pytest.raises(CheckpointError, match="do not show image_size=,"):
        load(pt_file, num_heads=4)


def test_what_train_takes_of_an_architecture_that_is_not_published(pt_file, tmp_path):
    """Its own --set names settings of a run: the message names a file that says the network's arguments."""
    with pytest.raises(CheckpointError, match='train takes no such argument.*cmfast.save.*preconditioning="edm"'):
        load_teacher(pt_file)
    save(load(pt_file, **ASKED, preconditioning="edm"), tmp_path / "teacher.safetensors")
    assert load_teacher(tmp_path / "teacher.safetensors").preconditioner.boundary == 0


def test_wrong_arguments(pt_file):
    with pytest.raises(ValueError, match="unknown preconditioning 'ddpm'; known: consistency, edm"):
        load(pt_file, preconditioning="ddpm", **ASKED)
    with pytest.raises(TypeError, match="unknown keyword num_channels; known: sigma_data.*model_channels"):
        load(pt_file, num_channels=32, **ASKED)
    with pytest.raises(ValueError, match="dtype=torch.int8: expected one of torch.float16"):
        load(pt_file, dtype=torch.int8, **ASKED)
    with pytest.raises(CheckpointError, match="num_head_channels=24 does not divide the 64"):
        load(pt_file, image_size=8, num_head_channels=24)
    for size in (0, -8, 8.5, float("inf"), 10**16):
        with pytest.raises(ValueError, match="image_size must be from 1 to 16,777,216, got"):
            load(pt_file, **{**ASKED, "image_size": size})
    for name, value in {"num_heads": 2.0, "num_res_blocks": "1", "model_channels": True, "num_classes": 10.0}.items():
        with pytest.raises(CheckpointError, match=f"{name} is {value!r}, expected a whole number from 1 to"):
            load(pt_file, image_size=8, **{"num_heads": 2, name: value})
    for name, value in {"channel_mult": "1,2", "attention_resolutions": 2}.items():
        with pytest.raises(CheckpointError, match=f"{name} is {value!r}, expected a list of numbers"):
            load(pt_file, **ASKED, **{name: value})
    for rho in (0, -7, 1e-300, float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match="rho must be above 0, 7 mostly, .*, got"):
            load(pt_file, **ASKED, rho=rho)
    with pytest.raises(ValueError, match="device='foo': expected one of PyTorch's"):
        load(pt_file, device="foo", **ASKED)
    with pytest.raises(ValueError, match=r"device='cuda:99': torch finds \d+ GPUs here"):
        load(pt_file, device="cuda:99", **ASKED)


def test_weights_that_are_no_numbers(tmp_path):
    weights = small_unet().state_dict()
    weights["out.2.bias"][1] = float("nan")
    torch.save(weights, tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="out.2.bias has values that are NaN or infinite") as caught:
        load(tmp_path / "model.pt", **ASKED)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "model, said", [(small_unet(), "is a UNetModel"), (Denoiser(torch.nn.Identity()), "holds a Identity")], ids=str
)
def test_what_cannot_be_saved(model, said, tmp_path):
    with pytest.raises(CheckpointError, match=f"only a Denoiser around a UNetModel can be saved, this one {said}"):
        save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", bytes(range(256)), b"PK\x03\x04" * 9],
    ids=["empty", "lfs", "html", "bytes", "zip"],
)
def test_garbage(content, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is empty|cut short or damaged.*it begins with b"):
        load(path, **ASKED)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_short(kind, part, tmp_path):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        save(Denoiser(small_unet()), path)
    else:
        torch.save(small_unet().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load(path, **ASKED)


class Payload:
    """What a hostile file would do when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    torch.save({"model": Payload(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="pickled Python objects.*could run any code.*torch.save"):
        load(tmp_path / "model.pt", **ASKED)
    assert not (tmp_path / "ran").exists()
    torch.save(small_unet(), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="pickled Python objects"):
        load(tmp_path / "module.pt", **ASKED)


def test_the_advice_for_pickled_objects_works(tmp_path, monkeypatch):
    """Of a training's file with its arguments; and weights by another name are named."""
    monkeypatch.chdir(tmp_path)
    weights = {"weight": torch.ones(1)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, "run.pt")
    with pytest.raises(CheckpointError, match=r"torch.save\(content\['model'\], 'weights.pt'\) of a dictionary"):
        checkpoint.read_pickle(Path("run.pt"))
    torch.save({"ema": weights, "step": 3}, "run.pt")
    with pytest.raises(CheckpointError, match="not a state dict: .*; make a file of its weights: ") as caught:
        load("run.pt")
    exec(str(caught.value).partition("weights: ")[2], {"torch": torch, "path": "run.pt"})
    assert torch.load("weights.pt") == weights


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list, expected a state dict"),
        ({}, "expected a state dict"),
        ({"state": {0: torch.ones(1)}, "param_groups": []}, "not a state dict: state, param_groups are no tensor"),
        ({"conv.weight": torch.ones(3)}, r"time_embed.0.weight is missing|input_blocks.0.0.weight is missing"),
    ],
    ids=["list", "empty", "optimizer", "another network"],
)
def test_files_of_something_else(content, message, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model.pt", **ASKED)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"num_classes": None}, r"1 tensor not expected \(label_emb.weight\) - check num_classes \(class_cond"),
        ({"num_classes": 11}, r"label_emb.weight: \[10, 128\] in the file, \[11, 128\] in the model.*num_classes"),
        ({"use_scale_shift_norm": False}, "emb_layers.1.weight.*check use_scale_shift_norm$"),
        ({"resblock_updown": False}, "check .*resblock_updown and conv_resample"),
        ({"attention_resolutions": [1]}, "check .*attention_resolutions"),
        ({"model_channels": 64}, "time_embed.0.weight.*check model_channels"),
        ({"num_res_blocks": 2}, "check .*num_res_blocks and channel_mult"),
        ({"in_channels": 1, "out_channels": 1}, "check in_channels and out_channels"),
        ({"dims": 1}, "check dims"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_the_weights(overrides, message, pt_file):
    with pytest.raises(CheckpointError, match=message):
        load(pt_file, **ASKED, **overrides)


def test_incomplete_weights(tmp_path):
    tensors = small_unet().state_dict()
    for name in ("middle_block.1.qkv.bias", "input_blocks.1.0.in_layers.2.weight"):
        torch.save({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=f"1 tensor missing \\({name}\\)"):
            load(tmp_path / "model.pt", **ASKED)
    for name in ("time_embed.0.weight", "out.2.weight", "middle_block.0.emb_layers.1.weight"):
        torch.save({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            load(tmp_path / "model.pt", **ASKED)


def test_one_tensor_of_any_name_missing_or_reshaped_is_an_error(tmp_path):
    """Whatever the inference makes of it, nothing else than an error or the same network comes out."""
    tensors = small_unet(num_classes=10, channel_mult=[1], attention_resolutions=[1]).state_dict()
    for name in tensors:
        for change in ({}, {name: torch.zeros(5)}, {name: torch.zeros(0, 0, 0, 0)}):
            rest = {key: value for key, value in tensors.items() if key != name} | change
            if name == "label_emb.weight" and not change:
                continue  # that is an unconditional network
            save_file(rest, tmp_path / "model.safetensors")
            with pytest.raises(CheckpointError):
                load(tmp_path / "model.safetensors", **ASKED)


def test_learned_variance_is_refused(tmp_path):
    torch.save(small_unet(out_channels=6).state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="6 channels from 3"):
        load(tmp_path / "model.pt", **ASKED)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda header: "{not json", "header is damaged"),
        (lambda header: "[]", "header is damaged"),
        (lambda header: json.dumps({**header, "version": 99}), "format 99, this cmfast reads up to 1"),
        (lambda header: json.dumps({k: v for k, v in header.items() if k != "network"}), "header is damaged"),
        (lambda header: json.dumps({**header, "dtype": "float17"}), "header is damaged"),
        (lambda header: json.dumps({**header, "network": {**header["network"], "width": 1}}), "width"),
    ],
    ids=["json", "list", "version", "no network", "dtype", "argument"],
)
def test_damaged_header(change, message, tmp_path):
    path = tmp_path / "model.safetensors"
    save(Denoiser(small_unet()), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["cmfast"])
    save_file(small_unet().state_dict(), path, {"cmfast": change(header)})
    with pytest.raises(CheckpointError, match=message):
        load(path)
