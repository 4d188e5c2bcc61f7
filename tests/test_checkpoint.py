"""Loading and saving: configurations from weights, exact round trips, whole files or none, errors that say why."""

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cmfast import checkpoint, unet_config
from cmfast.checkpoint import CheckpointError, load, save
from cmfast.denoiser import Denoiser
from cmfast.precondition import Preconditioner
from cmfast.unet import UNetModel
from tests.golden_utils import OUTPUT_TOLERANCE, relative_error, unet_arguments, unet_weights
from tests.golden_utils import load as load_golden

SMALL = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
ROOT = Path(__file__).resolve().parents[1]

ASKED = {"image_size": 8, "num_head_channels": 16}  # what shapes do not show


def small_network(**changes) -> UNetModel:
    return unet_weights(UNetModel(**{**SMALL, **changes})).eval()


def shapes_of(network: UNetModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture
def pt_file(tmp_path):
    """A checkpoint as the original writes it: a state dict."""
    path = tmp_path / "model.pt"
    torch.save(small_network(num_classes=10).state_dict(), path)
    return path


# --- configurations from shapes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 10},
        {"use_scale_shift_norm": False},
        {"resblock_updown": False},
        {"resblock_updown": False, "conv_resample": False},
        {"channel_mult": [1, 1, 2], "num_res_blocks": 2, "attention_resolutions": [1, 4]},
        {"channel_mult": [0.5, 1], "model_channels": 64, "attention_resolutions": []},
        {"channel_mult": [2], "attention_resolutions": [], "resblock_updown": False},
        {"channel_mult": [1, 2, 3], "num_res_blocks": 0, "attention_resolutions": [2]},
        {"dims": 1},
        {"dims": 3, "in_channels": 1, "out_channels": 1},
        {"out_channels": 6},
    ],
    ids=str,
)
def test_config_from_shapes(changes):
    with torch.device("meta"):
        network = UNetModel(**{**SMALL, **changes})
    config = unet_config.from_shapes(shapes_of(network))
    assert config.items() <= network.config.items()
    invisible = {"image_size", "num_head_channels", "num_heads", "num_heads_upsample", "dropout"}
    invisible |= {"use_checkpoint", "use_fp16", "use_new_attention_order"}
    assert config.keys() == network.config.keys() - invisible


@pytest.mark.parametrize("name", ["imagenet64_like", "lsun256_like", "plain"])
def test_config_of_golden_networks(name):
    _, meta = load_golden(f"unet_{name}_2303")
    with torch.device("meta"):
        expected = UNetModel(**unet_arguments(meta["config"])).config
    config = unet_config.from_shapes({key: tuple(shape) for key, shape in meta["state_dict"].items()})
    assert {key: expected[key] for key in config} == config


def test_published_imagenet64():
    _, meta = load_golden("unet_imagenet64_2303")
    config = unet_config.from_shapes({key: tuple(shape) for key, shape in meta["state_dict"].items()})
    network = checkpoint._build_network(config)
    assert (config["image_size"], config["num_head_channels"], config["num_classes"]) == (64, 64, 1000)
    assert list(shapes_of(network).items()) == [(key, tuple(shape)) for key, shape in meta["state_dict"].items()]
    assert len(network.state_dict()) == 541
    assert sum(p.numel() for p in network.parameters()) == 295_899_267
    assert network.middle_block[1].num_heads == 12


def test_published_lsun256():
    with torch.device("meta"):
        published = UNetModel(
            256, 3, 256, 3, 2, (8, 16, 32), 0.1, (1, 1, 2, 2, 4, 4), num_head_channels=64, resblock_updown=True
        )
    assert len(published.state_dict()) == 566
    assert sum(p.numel() for p in published.parameters()) == 526_304_771
    network = checkpoint._build_network(unet_config.from_shapes(shapes_of(published)))
    assert network.config == published.config | {"dropout": 0}


@pytest.mark.parametrize("name", ["imagenet64_like", "lsun256_like"])
def test_golden_output_of_a_loaded_network(name, tmp_path):
    tensors, meta = load_golden(f"unet_{name}_2303")
    arguments = unet_arguments(meta["config"])
    torch.save(unet_weights(UNetModel(**arguments)).state_dict(), tmp_path / "model.pt")
    model = load(tmp_path / "model.pt", image_size=64, num_head_channels=arguments["num_head_channels"])
    out = model.network(tensors["x"], tensors["timesteps"], tensors.get("y"))
    assert relative_error(out, tensors["out"]) < OUTPUT_TOLERANCE
    assert model.image_shape == (3, 64, 64)


# --- files of the original -------------------------------------------------------------------------


def test_pt(pt_file):
    model = load(pt_file, **ASKED)
    assert same_bits(model.network, small_network(num_classes=10))
    assert (model.num_classes, model.image_shape) == (10, (3, 8, 8))
    assert (model.sigma_min, model.sigma_max, model.rho) == (0.002, 80.0, 7.0)
    assert model.preconditioner == Preconditioner.consistency()
    assert not model.training and model.network.middle_block[1].num_heads == 4
    x = torch.randn(2, 3, 8, 8)
    out = model(x, 80.0, torch.tensor([0, 9]))
    assert out.shape == x.shape and out.isfinite().all()


def test_loaded_parameters_can_be_trained(pt_file):
    before = pt_file.read_bytes()
    model = load(str(pt_file), **ASKED).train()
    model(torch.randn(1, 3, 8, 8), 1.0, torch.tensor([3])).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    assert pt_file.read_bytes() == before  # parameters are mapped from the file, privately


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod.", "network.", "state_dict", "model"])
def test_wrapped_state_dicts(wrap, tmp_path):
    tensors = small_network().state_dict()
    content = {wrap + key: value for key, value in tensors.items()} if "." in wrap else {wrap: tensors, "step": 3}
    torch.save(content, tmp_path / "model.pt")
    assert same_bits(load(tmp_path / "model.pt", **ASKED).network, small_network())


def test_files_before_pytorch_1_6(tmp_path):
    tensors = collections.OrderedDict(small_network().state_dict())
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same_bits(load(tmp_path / "old.pt", **ASKED).network, small_network())


def test_bare_safetensors(tmp_path):
    save_file(small_network().state_dict(), tmp_path / "bare.safetensors")
    os.link(tmp_path / "bare.safetensors", tmp_path / "bare.bin")  # known by its content, too
    for name in ("bare.safetensors", "bare.bin"):
        assert same_bits(load(tmp_path / name, **ASKED).network, small_network())


def test_overrides(pt_file):
    model = load(pt_file, image_size=16, num_heads=2, dropout=0.3, sigma_data=1.0, sigma_min=0.01, sigma_max=50, rho=5)
    assert model.network.config["dropout"] == 0.3
    assert model.network.middle_block[1].num_heads == 2
    assert model.image_shape == (3, 16, 16)
    assert (model.sigma_min, model.sigma_max, model.rho) == (0.01, 50, 5)
    assert model.preconditioner == Preconditioner(sigma_data=1.0, boundary=0.01)


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("cd_imagenet64_l2.pt", None, "consistency"),
        ("edm_imagenet64_ema.pt", None, "edm"),
        ("edm_imagenet64_ema.pt", "consistency", "consistency"),
        ("cd_imagenet64_l2.pt", "edm", "edm"),
    ],
)
def test_preconditioning(name, given, expected, pt_file):
    path = pt_file.rename(pt_file.with_name(name))
    assert load(path, preconditioning=given, **ASKED).preconditioner == Preconditioner.by_name(expected)


def test_half_is_the_torso_as_in_the_original(pt_file):
    for dtype in (torch.float16, torch.bfloat16):
        expected = small_network(num_classes=10).convert_torso(dtype)
        assert same_bits(load(pt_file, dtype=dtype, **ASKED).network, expected)
    double = load(pt_file, dtype=torch.float64, **ASKED)
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_weights_are_not_initialised_first(pt_file):
    """Loading costs no random numbers, and does not import the compiler, as normal_ on the meta device does."""
    code = f"""
import sys, torch, cmfast
state = torch.get_rng_state()
cmfast.load({str(pt_file)!r}, **{ASKED})
assert torch.equal(torch.get_rng_state(), state)
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float64", "torso", "whole"])
def test_round_trip_is_bit_equal(kind, tmp_path):
    network = small_network(num_classes=10, dropout=0.25)
    network = {
        "float32": network.float,
        "float64": network.double,
        "torso": lambda: network.convert_torso(torch.bfloat16),
        "whole": network.half,
    }[kind]()
    model = Denoiser(network, Preconditioner(0.6, 0.01), sigma_min=0.01, sigma_max=70.0, rho=6.0, image_shape=(3, 8, 8))
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert same_bits(again.network, network)
    assert again.network.config == network.config
    for name in ("preconditioner", "sigma_min", "sigma_max", "rho", "image_shape", "num_classes"):
        assert getattr(again, name) == getattr(model, name), name
    save(again, tmp_path / "again.safetensors")  # of mapped tensors
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_dtype_of_the_file_is_not_that_of_the_model(tmp_path):
    network = small_network()
    save(Denoiser(network), tmp_path / "half.safetensors", dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in network.parameters())
    model = load(tmp_path / "half.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name].half().float())
    assert load(tmp_path / "half.safetensors", dtype=torch.bfloat16).network.dtype == torch.bfloat16


def test_header_and_arguments(tmp_path):
    save(Denoiser(small_network(), Preconditioner.edm()), tmp_path / "teacher.safetensors")
    assert load(tmp_path / "teacher.safetensors").preconditioner == Preconditioner.edm()
    model = load(tmp_path / "teacher.safetensors", preconditioning="consistency", sigma_max=20.0, use_checkpoint=True)
    assert model.preconditioner == Preconditioner.consistency()
    assert model.sigma_max == 20.0
    assert model.network.config["use_checkpoint"]


def test_saved_after_channels_last_and_compile(tmp_path):
    network = small_network().to(memory_format=torch.channels_last)
    save(Denoiser(torch.compile(network, backend="eager")), tmp_path / "model.safetensors")
    assert same_bits(load(tmp_path / "model.safetensors").network, small_network())


def test_save_replaces_what_a_link_points_to(tmp_path):
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    save(Denoiser(small_network()), target)
    link.symlink_to(target)
    model = load(link)
    with torch.no_grad():
        model.network.out[2].bias.add_(1)
    save(model, link)  # the file that its own parameters are mapped from
    assert link.is_symlink()
    assert same_bits(load(target).network, model.network)


# --- a whole file or none ----------------------------------------------------------------------------


def write_half_and_fail(tensors, path, metadata):
    with open(path, "wb") as file:
        file.write(b"half a file")
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["write", "flush", "rename"])
@pytest.mark.parametrize("exists", [True, False], ids=["over a file", "new"])
def test_crash_leaves_the_old_file_and_nothing_else(step, exists, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = Denoiser(small_network())
    if exists:
        save(model, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args):
        raise KeyboardInterrupt

    if step == "write":
        monkeypatch.setattr(checkpoint, "save_file", write_half_and_fail)
    else:
        monkeypatch.setattr(os, {"flush": "fsync", "rename": "replace"}[step], fail)
    with torch.no_grad():
        model.network.out[2].bias.add_(1)
    with pytest.raises(KeyboardInterrupt):
        save(model, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    save(Denoiser(small_network()), tmp_path / "model.safetensors")
    assert events[:2] == ["fsync", "replace"]


def test_unwritable_places(tmp_path, monkeypatch):
    model = Denoiser(small_network())
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        save(model, tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        save(model, tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(PermissionError, match="no permission to write into"):
        save(model, tmp_path / "model.safetensors")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        return save_file(tensors, "/dev/full/model", metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="cannot write .*model.safetensors"):
        save(Denoiser(small_network()), tmp_path / "model.safetensors")


def test_only_unets_are_saved(tmp_path):
    with pytest.raises(CheckpointError, match="holds a Identity"):
        save(Denoiser(torch.nn.Identity()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="dtype=torch.int8"):
        save(Denoiser(small_network()), tmp_path / "model.safetensors", dtype=torch.int8)


# --- errors ------------------------------------------------------------------------------------------


def test_missing_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*nothing.pt"):
        load(tmp_path / "nothing.pt")
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "mnist.safetensors")
    with pytest.raises(FileNotFoundError, match="bundled model is missing"):
        load()
    save(Denoiser(small_network()), tmp_path / "mnist.safetensors")
    assert same_bits(load().network, small_network())


def test_what_shapes_do_not_show_is_asked_for(pt_file):
    with pytest.raises(CheckpointError, match="image_size= and num_head_channels= .*published.*pass them by name"):
        load(pt_file)
    with pytest.raises(CheckpointError, match="do not show image_size=,"):
        load(pt_file, num_heads=4)


def test_wrong_arguments(pt_file):
    with pytest.raises(ValueError, match="unknown preconditioning 'ddpm'; known: consistency, edm"):
        load(pt_file, preconditioning="ddpm", **ASKED)
    with pytest.raises(TypeError, match="unknown keyword num_channels; known: sigma_data.*model_channels"):
        load(pt_file, num_channels=32, **ASKED)
    with pytest.raises(ValueError, match="dtype=torch.int8: expected one of torch.float16"):
        load(pt_file, dtype=torch.int8, **ASKED)
    with pytest.raises(CheckpointError, match="num_head_channels=24 does not divide the 64"):
        load(pt_file, image_size=8, num_head_channels=24)


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
        save(Denoiser(small_network()), path)
    else:
        torch.save(small_network().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
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
    torch.save(small_network(), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="pickled Python objects"):
        load(tmp_path / "module.pt", **ASKED)


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
    tensors = small_network().state_dict()
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
    tensors = small_network(num_classes=10, channel_mult=[1], attention_resolutions=[1]).state_dict()
    for name in tensors:
        for change in ({}, {name: torch.zeros(5)}, {name: torch.zeros(0, 0, 0, 0)}):
            rest = {key: value for key, value in tensors.items() if key != name} | change
            if name == "label_emb.weight" and not change:
                continue  # that is an unconditional network
            save_file(rest, tmp_path / "model.safetensors")
            with pytest.raises(CheckpointError):
                load(tmp_path / "model.safetensors", **ASKED)


def test_learned_variance_is_refused(tmp_path):
    torch.save(small_network(out_channels=6).state_dict(), tmp_path / "model.pt")
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
    save(Denoiser(small_network()), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["cmfast"])
    save_file(small_network().state_dict(), path, {"cmfast": change(header)})
    with pytest.raises(CheckpointError, match=message):
        load(path)


# --- diffusers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        num_class_embeds=10,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_min=0.01, sigma_max=40.0)
    return diffusers.ConsistencyModelPipeline(unet, scheduler)


@pytest.fixture
def pipeline_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_diffusers_objects(pipeline):
    model = load(pipeline)
    assert model.network.unet is pipeline.unet
    assert (model.sigma_min, model.sigma_max) == (0.01, 40.0)
    assert model.preconditioner == Preconditioner.consistency(sigma_min=0.01)
    assert (model.num_classes, model.image_shape) == (10, (3, 8, 8))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    timesteps = torch.tensor([40.0, -1500.0])
    assert torch.equal(model.network(x, timesteps, labels), pipeline.unet(x, timesteps, labels).sample)
    assert model(x, 3.0, labels).shape == x.shape

    alone = load(pipeline.unet, sigma_max=20.0)
    assert (alone.sigma_min, alone.sigma_max) == (0.002, 20.0)


def test_a_step_of_the_pipelines_scheduler(pipeline):
    """Our D is the one that the scheduler makes of the network's output."""
    model = load(pipeline)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(1)
    timestep = scheduler.timesteps[0]
    x, labels = scheduler.init_noise_sigma * torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    scaled = scheduler.scale_model_input(x, timestep)
    output = pipeline.unet(scaled, timestep, labels).sample
    expected = scheduler.step(output, timestep, x).prev_sample
    assert relative_error(model(x, float(scheduler.sigmas[0]), labels, clip=True), expected) < 1e-4


@pytest.mark.parametrize("folder", ["", "unet"], ids=["pipeline", "unet"])
def test_diffusers_folders(folder, pipeline, pipeline_folder):
    model = load(pipeline_folder / folder)
    assert same_bits(model.network.unet, pipeline.unet)
    assert model.sigma_max == (80.0 if folder else 40.0)
    assert load(pipeline_folder / folder, dtype=torch.bfloat16).network.unet.dtype == torch.bfloat16


def test_diffusers_errors(pipeline, pipeline_folder, tmp_path):
    with pytest.raises(TypeError, match="dropout does not apply to a diffusers model"):
        load(pipeline, dropout=0.1)
    with pytest.raises(TypeError, match="cannot load a Identity: expected a path"):
        load(torch.nn.Identity())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither unet/config.json nor config.json"):
        load(tmp_path / "empty")

    scheduler = pipeline_folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"_class_name": "DDPMScheduler"}')
    with pytest.raises(CheckpointError, match="has a DDPMScheduler, expected the CMStochasticIterativeScheduler"):
        load(pipeline_folder)
    config = pipeline_folder / "unet" / "config.json"
    config.write_text('{"_class_name": "UNet1DModel"}')
    with pytest.raises(CheckpointError, match="holds a UNet1DModel, expected a UNet2DModel"):
        load(pipeline_folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(pipeline_folder)


def test_diffusers_weights_missing(pipeline_folder):
    for file in (pipeline_folder / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="could not be loaded by diffusers"):
        load(pipeline_folder)


def test_without_diffusers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "cmfast\[diffusers\]"'):
        load(tmp_path)
    shutil.rmtree(tmp_path)
