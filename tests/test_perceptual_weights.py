"""Weights of LPIPS: whose they are, where they come from, and what is said where they do not; nothing is downloaded."""

import copy
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn

from cmfast import perceptual
from cmfast.perceptual import LPIPS
from tests.perceptual_utils import EXTRA, NETS, images, make, package_heads, random_weights

ROOT = Path(__file__).parents[1]


def test_weights_are_seen_by_no_optimizer_and_no_checkpoint():
    holder = nn.ModuleDict({"net": nn.Linear(2, 2), "lpips": make("alex")})
    assert not list(make("alex").parameters())
    assert not any(buffer.requires_grad for buffer in make("alex").buffers())
    assert list(holder.state_dict()) == ["net.weight", "net.bias"]
    holder.load_state_dict(nn.ModuleDict({"net": nn.Linear(2, 2)}).state_dict())
    x, y = images(1, 3, 32, 32)
    expected = make("alex")(x, y, resize=False)
    assert torch.equal(copy.deepcopy(holder).train()["lpips"](x, y, resize=False), expected)


def test_caller_keeps_their_weights():
    """Neither shared nor changed."""
    pytest.importorskip("torchvision", reason=EXTRA)
    weights = {name: weight.clone() for name, weight in random_weights("alex").items()}
    model = LPIPS("alex", trunk_weights=weights, pretrained=False)
    before = model.trunk[0].weight.clone()
    weights["0.weight"].zero_()
    assert torch.equal(model.trunk[0].weight, before)


def test_heads_that_are_parameters():
    """As in `named_parameters()` of a module of the lpips package: they get no gradient, and a copy can be made."""
    pytest.importorskip("torchvision", reason=EXTRA)
    channels = perceptual._TRUNKS["alex"].channels
    heads = {f"lin{i}.model.1.weight": nn.Parameter(torch.rand(1, n, 1, 1)) for i, n in enumerate(channels)}
    model = LPIPS("alex", trunk_weights=random_weights("alex"), head_weights=heads)
    x, y = images(1, 3, 32, 32)
    assert not copy.deepcopy(model)(x, y, resize=False).requires_grad


def test_import_is_lean():
    code = "import sys, cmfast.perceptual; print({'torchvision', 'lpips', 'piq', 'scipy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_constructor_does_not_import_lpips(monkeypatch):
    pytest.importorskip("lpips", reason=EXTRA)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, name)
    LPIPS("alex", trunk_weights=random_weights("alex"))
    assert "lpips" not in sys.modules


@pytest.mark.parametrize("net", NETS)
def test_heads_are_those_of_the_package(net):
    heads = torch.cat([weight.flatten() for weight in package_heads(net).values()])
    assert torch.equal(make(net).heads, heads)


def test_weights_from_files_and_whole_models(tmp_path):
    torchvision = pytest.importorskip("torchvision", reason=EXTRA)
    whole = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(whole, tmp_path / "trunk.pth")
    torch.save(package_heads("squeeze"), tmp_path / "heads.pth")
    files = {"trunk_weights": tmp_path / "trunk.pth", "head_weights": str(tmp_path / "heads.pth")}
    model = LPIPS("squeeze", **files)
    assert torch.equal(model.trunk[12].expand3x3.weight, whole["features.12.expand3x3.weight"])
    assert torch.equal(model.heads, make("squeeze").heads)


def test_download_that_fails_says_what_to_do_and_that_works(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision", reason=EXTRA)

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(OSError) as error:
        LPIPS("squeeze")
    cached = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    url = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
    for words in "no route to host", url, str(cached), 'trunk_weights="squeezenet1_1-b8a52dc0.pth"':
        assert words in str(error.value)

    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(weights, cached)
    model = LPIPS("squeeze", head_weights=package_heads("squeeze"))
    assert torch.equal(model.trunk[0].weight, weights["features.0.weight"])


@pytest.mark.parametrize("keep", [0, 100, 0.5], ids=str)
@pytest.mark.parametrize("which", ["trunk", "head", "cached"])
def test_damaged_weights_are_named_and_what_to_do(tmp_path, monkeypatch, which, keep):
    pytest.importorskip("torchvision", reason=EXTRA)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir()
    torch.save(package_heads("squeeze"), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    given = {"trunk": {"trunk_weights": path}, "head": {"head_weights": path, "pretrained": False}, "cached": {}}
    name, advice = {"cached": ("the trunk's weights", "remove it, and it is downloaded again")}.get(
        which, (f"{which}_weights", "fetch it again")
    )
    with pytest.raises(ValueError, match=f"^{name}: {path} is no file of weights, .* damaged .*: {advice}$"):
        LPIPS("squeeze", **given[which])
    with pytest.raises(FileNotFoundError, match="^trunk_weights: there is no file .*/nowhere.pth"):
        LPIPS("squeeze", trunk_weights=tmp_path / "nowhere.pth")


@torch.no_grad()
def test_random_weights_need_no_download_and_no_lpips(monkeypatch):
    pytest.importorskip("torchvision", reason=EXTRA)
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    distances = []
    for _ in range(2):
        torch.manual_seed(2303)
        distances.append(LPIPS("squeeze", pretrained=False)(*images(2, 3, 32, 32), resize=False))
    assert torch.equal(*distances)
    assert (distances[0] > 0.01).all()


@pytest.mark.parametrize("package", ["torchvision", "lpips"])
def test_missing_package_names_the_extra(package, monkeypatch):
    weights = random_weights("alex")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "cmfast\[lpips\]"'):
        LPIPS("alex", trunk_weights=weights)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"net": "vgg19"}, ValueError, "unknown net 'vgg19'; known: vgg, alex, squeeze"),
        ({"pooling": "mean"}, ValueError, "unknown pooling 'mean'; known: avg, max"),
        ({"trunk_weights": 3}, TypeError, "trunk_weights must be a state dict or the path of one, got int"),
        ({"trunk_weights": {}}, ValueError, "vgg16, with features.0.weight .* got no such entry"),
        ({"trunk_weights": "nowhere.pth"}, FileNotFoundError, "nowhere.pth"),
    ],
)
def test_constructor_errors(arguments, error, message):
    pytest.importorskip("torchvision", reason=EXTRA)
    with pytest.raises(error, match=message):
        LPIPS(**arguments)


def test_weights_of_another_network():
    with pytest.raises(ValueError, match=r"features.0.weight \[64, 3, 11, 11\], got \[64, 3, 3, 3\]"):
        LPIPS("alex", trunk_weights=random_weights("vgg"))
    with pytest.raises(ValueError, match=r"head_weights must hold .* of \(64, 192, 384, 256, 256\) channels"):
        LPIPS("alex", trunk_weights=random_weights("alex"), head_weights=package_heads("vgg"))
