"""Loading and saving: exact round trips, whole files or none."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cmfast import checkpoint, images, unet_config
from cmfast.checkpoint import CheckpointError, load, save
from cmfast.denoiser import Denoiser
from cmfast.precondition import Preconditioner
from cmfast.tolerances import GOLDEN_VALUE
from cmfast.unet import UNetModel
from tests.checkpoint_utils import ASKED, same_bits
from tests.golden_utils import (
    load as load_golden,
)
from tests.golden_utils import (
    relative_error,
    small_unet,
    unet_arguments,
    unet_weights,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pt_file(tmp_path):
    """A checkpoint as the original writes it: a state dict."""
    path = tmp_path / "model.pt"
    torch.save(small_unet(num_classes=10).state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["imagenet64_like", "lsun256_like"])
def test_golden_output_of_a_loaded_network(name, tmp_path):
    tensors, meta = load_golden(f"unet_{name}_2303")
    arguments = unet_arguments(meta["config"])
    torch.save(unet_weights(UNetModel(**arguments)).state_dict(), tmp_path / "model.pt")
    model = load(tmp_path / "model.pt", image_size=64, num_head_channels=arguments["num_head_channels"])
    out = model.network(tensors["x"], tensors["timesteps"], tensors.get("y"))
    assert relative_error(out, tensors["out"]) < GOLDEN_VALUE
    assert model.image_shape == (3, 64, 64)


# --- files of the original -------------------------------------------------------------------------


def test_pt(pt_file):
    model = load(pt_file, **ASKED)
    assert same_bits(model.network, small_unet(num_classes=10))
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
    tensors = small_unet().state_dict()
    content = {wrap + key: value for key, value in tensors.items()} if "." in wrap else {wrap: tensors, "step": 3}
    torch.save(content, tmp_path / "model.pt")
    assert same_bits(load(tmp_path / "model.pt", **ASKED).network, small_unet())


def test_files_before_pytorch_1_6(tmp_path):
    tensors = collections.OrderedDict(small_unet().state_dict())
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same_bits(load(tmp_path / "old.pt", **ASKED).network, small_unet())


def test_bare_safetensors(tmp_path):
    save_file(small_unet().state_dict(), tmp_path / "bare.safetensors")
    os.link(tmp_path / "bare.safetensors", tmp_path / "bare.bin")  # known by its content, too
    for name in ("bare.safetensors", "bare.bin"):
        assert same_bits(load(tmp_path / name, **ASKED).network, small_unet())


def test_overrides(pt_file):
    model = load(pt_file, image_size=16, num_heads=2, dropout=0.3, sigma_data=1.0, sigma_min=0.01, sigma_max=50, rho=5)
    assert model.network.config["dropout"] == 0.3
    assert model.network.middle_block[1].num_heads == 2
    assert model.image_shape == (3, 16, 16)
    assert (model.sigma_min, model.sigma_max, model.rho) == (0.01, 50, 5)
    assert model.preconditioner == Preconditioner(sigma_data=1.0, boundary=0.01)


def test_heads_that_are_given_count(tmp_path, pt_file, monkeypatch):
    """Though the file, or the published network of these shapes, says how wide they are, which would win."""
    save(Denoiser(small_unet(num_classes=10)), tmp_path / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in small_unet(num_classes=10).state_dict().items()}
    monkeypatch.setitem(unet_config.PUBLISHED, "small", (unet_config.from_shapes(shapes), ASKED))
    for path in (tmp_path / "model.safetensors", pt_file):

        def heads(path=path, **given):
            network = load(path, **given).network
            return network.middle_block[1].num_heads, network.output_blocks[0][1].num_heads

        assert heads() == (4, 4) and heads(num_heads=2) == (2, 2)
        assert heads(num_heads=2, num_heads_upsample=1) == (2, 1)
        assert heads(num_heads=2, num_head_channels=32) == (2, 2) and heads(num_heads=1, num_head_channels=16) == (4, 4)
        with pytest.raises(CheckpointError, match="do not show num_head_channels= .or num_heads="):
            heads(num_heads_upsample=1)


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
        expected = small_unet(num_classes=10).convert_torso(dtype)
        assert same_bits(load(pt_file, dtype=dtype, **ASKED).network, expected)
        torch.save(small_unet(num_classes=10).half().state_dict(), pt_file.with_name("half.pt"))
        assert (
            load(pt_file.with_name("half.pt"), dtype=dtype, **ASKED).network.time_embed[0].weight.dtype == torch.float32
        )
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
    network = small_unet(num_classes=10, dropout=0.25)
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
    network = small_unet()
    save(Denoiser(network), tmp_path / "half.safetensors", dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in network.parameters())
    model = load(tmp_path / "half.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name].half().float())
    assert load(tmp_path / "half.safetensors", dtype=torch.bfloat16).network.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["float32", "torso", "whole", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_converts_back(kind, dtype, tmp_path):
    """To what the model has: a network that is half as a whole, too, whose torso alone `load(dtype=)` makes half."""
    network = small_unet()
    {"float32": network.float, "torso": lambda: network.convert_torso(torch.bfloat16), "whole": network.bfloat16,
     "float64": network.double}[kind]()  # fmt: skip
    save(Denoiser(network), tmp_path / "model.safetensors", dtype=dtype)
    again = load(tmp_path / "model.safetensors").network
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in network.parameters()]
    half = load(tmp_path / "model.safetensors", dtype=torch.float16).network
    assert half.dtype == torch.float16 and half.time_embed[0].weight.dtype == torch.float32


def test_files_that_do_not_say_what_is_half(tmp_path):
    """As they were written before: the torso is."""
    save(Denoiser(small_unet().bfloat16()), tmp_path / "model.safetensors", dtype=torch.float32)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        header, tensors = json.loads(file.metadata()["cmfast"]), {name: file.get_tensor(name) for name in file.keys()}
    del header["whole"]
    checkpoint.write_tensors(tensors, tmp_path / "old.safetensors", {"cmfast": json.dumps(header)})
    old = load(tmp_path / "old.safetensors").network
    assert old.dtype == torch.bfloat16 and old.time_embed[0].weight.dtype == torch.float32


def test_a_preconditioner_that_no_file_holds(tmp_path):
    class Own(Preconditioner):
        def c_noise(self, sigma):
            return sigma

    with pytest.warns(UserWarning, match="and Own overrides c_noise: after load"):
        save(Denoiser(small_unet(), Own()), tmp_path / "model.safetensors")


def test_numbers_of_numpy(tmp_path):
    arguments = {"channel_mult": np.array([1, 2]), "num_classes": np.int64(3), "dropout": np.float32(0.5)}
    network = UNetModel(np.int64(8), 3, np.int32(32), 3, 1, [np.int64(2)], **arguments, num_head_channels=16)
    assert json.loads(json.dumps(network.config)) == network.config
    model = Denoiser(network, Preconditioner(np.float32(0.25), np.float64(0.5)), sigma_min=np.float32(0.5),
                     sigma_max=np.float32(70), rho=np.int64(5), image_shape=np.array([3, 8, 8]))  # fmt: skip
    model.rho = np.float32(6)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.preconditioner == Preconditioner(0.25, 0.5) and again.network.config == network.config
    assert (again.sigma_min, again.sigma_max, again.rho, again.image_shape, again.num_classes) == (
        0.5, 70.0, 6.0, (3, 8, 8), 3
    )  # fmt: skip
    for value in (model.sigma_min, model.sigma_max, model.preconditioner.sigma_data, model.preconditioner.boundary):
        assert type(value) is float
    assert {type(size) for size in (*model.image_shape, model.num_classes)} == {int}
    with pytest.raises(TypeError, match="a Tensor among the arguments of a network"):
        network.config["dropout"] = torch.tensor(0.5)
        save(model, tmp_path / "model.safetensors")


def test_numbers_of_numpy_are_given(pt_file):
    """In lists of any kind."""
    given = {"image_size": np.int64(8), "num_heads": np.int32(2), "dropout": np.float32(0.5)}
    lists = {"channel_mult": np.array([1, 2]), "attention_resolutions": {2}}
    assert load(pt_file, **given, **lists).network.config["channel_mult"] == [1, 2]


def test_header_and_arguments(tmp_path):
    save(Denoiser(small_unet(), Preconditioner.edm()), tmp_path / "teacher.safetensors")
    assert load(tmp_path / "teacher.safetensors").preconditioner == Preconditioner.edm()
    model = load(tmp_path / "teacher.safetensors", preconditioning="consistency", sigma_max=20.0, use_checkpoint=True)
    assert model.preconditioner == Preconditioner.consistency()
    assert model.sigma_max == 20.0
    assert model.network.config["use_checkpoint"]


def test_tied_weights(tmp_path):
    network = small_unet()
    network.middle_block[2].in_layers[2].weight = network.middle_block[0].in_layers[2].weight
    save(Denoiser(network), tmp_path / "model.safetensors")
    assert same_bits(load(tmp_path / "model.safetensors").network, network)
    torch.save({name: tensor.clone() for name, tensor in network.state_dict().items()}, tmp_path / "model.pt")
    assert same_bits(load(tmp_path / "model.pt", **ASKED).network, network)


def test_saved_after_channels_last_and_compile(tmp_path):
    network = small_unet().to(memory_format=torch.channels_last)
    save(Denoiser(torch.compile(network, backend="eager")), tmp_path / "model.safetensors")
    assert same_bits(load(tmp_path / "model.safetensors").network, small_unet())


def test_save_replaces_what_a_link_points_to(tmp_path):
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    save(Denoiser(small_unet()), target)
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
    model = Denoiser(small_unet())
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


def test_permissions_are_those_of_any_new_file(tmp_path):
    save(Denoiser(small_unet()), tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    save(Denoiser(small_unet()), tmp_path / "model.safetensors")
    assert events[:2] == ["fsync", "replace"]


def test_unwritable_places(tmp_path, monkeypatch):
    model = Denoiser(small_unet())
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
        save(Denoiser(small_unet()), tmp_path / "model.safetensors")


def test_only_unets_are_saved(tmp_path):
    with pytest.raises(CheckpointError, match="holds a Identity"):
        save(Denoiser(torch.nn.Identity()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="dtype=torch.int8"):
        save(Denoiser(small_unet()), tmp_path / "model.safetensors", dtype=torch.int8)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_file_may_be_written_again(suffix, pt_file, tmp_path):
    """Also with the weights that came from it, or cut off: they are no part of it."""
    path = tmp_path / f"again{suffix}"
    first = load(pt_file, **ASKED)
    write = torch.save if suffix == ".pt" else save_file
    write(first.network.state_dict(), path)
    model = load(path, **ASKED)
    if (maps := Path("/proc/self/maps")).exists():
        assert str(path) not in maps.read_text()  # else what follows ends the process
    write(model.network.state_dict(), path)
    assert same_bits(model.network, load(path, **ASKED).network)
    os.truncate(path, 8)
    assert same_bits(model.network, first.network)


def test_images_that_are_not_square(tmp_path):
    network = UNetModel(16, 1, 32, 1, 1, [2], channel_mult=(1, 2), num_head_channels=16)
    save(Denoiser(network, image_shape=(1, 16, 48)), tmp_path / "wide.safetensors")
    assert load(tmp_path / "wide.safetensors").image_shape == (1, 16, 48)
    assert load(tmp_path / "wide.safetensors", image_size=8).image_shape == (1, 8, 8)


@pytest.mark.parametrize("name", ["image_size", "sigma_max", "num_heads", "dropout"])
@pytest.mark.parametrize("value", ["a", None, True])
def test_numbers_that_are_none(name, value, pt_file):
    with pytest.raises(ValueError, match=f"{name} must be a number, got {value!r}"):
        load(pt_file, **{**ASKED, name: value})


def test_a_long_name(tmp_path):
    """As long as the file system allows, in letters of several bytes."""
    path = tmp_path / ("ü" * 121 + ".safetensors")
    save(Denoiser(small_unet()), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    images.save(path.with_suffix(".png"), torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
    assert len(list(tmp_path.iterdir())) == 2
