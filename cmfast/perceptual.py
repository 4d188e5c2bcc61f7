"""LPIPS, the learned perceptual distance (Zhang et al. 2018), as the losses of consistency models use it.

Importing this module loads torch alone. Making an LPIPS loads torchvision, for the trunk, and reads the
linear weights that the lpips package ships.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast import perceptual_cpu
from cmfast.ops import _check
from cmfast.ops.lpips import lpips_input, lpips_layer, value_range_of

#: A state dict, or the path of a file that torch.load reads one from.
Weights: TypeAlias = Mapping[str, Tensor] | str | os.PathLike[str]

#: What the trunk can be asked to compute in; float64 comes with `.double()`.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class _Trunk(NamedTuple):
    """A network of torchvision, and the layers of its `features` whose outputs are compared."""

    model: str
    weights: str
    layers: tuple[int, ...]
    channels: tuple[int, ...]
    pooling: str  # the default
    min_size: int  # of an image whose last feature map is not empty


_TRUNKS = {
    "vgg": _Trunk(
        "vgg16",
        "VGG16_Weights",
        layers=(3, 8, 15, 22, 29),  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        channels=(64, 128, 256, 512, 512),
        pooling="avg",
        min_size=16,
    ),
    "alex": _Trunk(
        "alexnet",
        "AlexNet_Weights",
        layers=(1, 4, 7, 9, 11),  # every ReLU
        channels=(64, 192, 384, 256, 256),
        pooling="max",
        min_size=31,
    ),
    "squeeze": _Trunk(
        "squeezenet1_1",
        "SqueezeNet1_1_Weights",
        layers=(1, 4, 7, 9, 10, 11, 12),  # relu1, fire3, fire5, fire6 to fire9
        channels=(64, 128, 256, 384, 384, 512, 512),
        pooling="max",
        min_size=17,
    ),
}


def unit_images(image: Tensor, *, resize: bool = True, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """What the losses of consistency models compare: [B, C, 224, 224] in [0, 1] where the image [B, C, H, W] was
    narrower than 256 (bilinear), else of its size.

    resize: False leaves the size. value_range: what stands for black and for full intensity.
    """
    low, high = value_range
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    size = _resized(image) if resize else None
    if size is not None:
        image = F.interpolate(image, size=size, mode="bilinear")
    return (image - low) / (high - low)


def _resized(image: Tensor) -> int | None:
    """The side that images are resized to; None if they are wide enough."""
    return 224 if image.shape[-1] < 256 else None


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, v0.1: `ops.lpips_layer` summed over the layers of a trunk.

    The default, VGG-16 with average pooling in place of max pooling, is the distance that the published
    consistency models were trained with, `piq.LPIPS(replace_pooling=True, reduction="none")`. With max
    pooling it is that of the lpips package, as the other trunks are.

    Args:
        net: "vgg", "alex" or "squeeze": torchvision's vgg16, alexnet, squeezenet1_1.
        pooling: "avg" or "max"; by default "avg" for vgg, "max" for the others.
        trunk_weights: of the torchvision model, or of its `features` alone; by default torchvision's
            IMAGENET1K_V1, downloaded once to the cache of torch.hub.
        head_weights: of the linear layers, named as in the lpips package; by default those it has installed.
        pretrained: False leaves weights that are not given random (trunk) or one (heads): for tests, timing.
        dtype: what the trunk computes in, to which its weights are cast: float32, bfloat16 or float16. By default
            float32 on a CPU, and on a GPU bfloat16 from when the module is moved there. The distances accumulate in
            float32 whatever it is; in half precision two images that hardly differ are told apart less well.

    All weights are non-persistent buffers: `.to()` moves them, but no optimizer, average or checkpoint of a
    module that holds an LPIPS sees them, and gradients reach the images alone. The trunk runs in channels_last.

    On a CPU, in float32, a batch is measured in parts of one image of 224 x 224, or as many smaller ones, each with its
    gradient at once: the activations of one part are all that is kept. 3x3 convolutions are `native.winograd`'s, whose
    filters take 1.8 times the memory of the weights, and as much again where there are gradients.

    Raises:
        TypeError: a `dtype` that is none of these.
        ValueError: unknown `net` or `pooling`, weights that are those of another network, or a damaged file.
        ImportError: torchvision or lpips is missing: pip install "cmfast[lpips]".
        OSError: the trunk's weights could not be downloaded; the message says which file to put where.

    >>> lpips = LPIPS("alex", pretrained=False)
    >>> x = torch.rand(2, 3, 32, 32) * 2 - 1
    >>> lpips(x, x, resize=False)
    tensor([0., 0.])
    """

    mean: Tensor
    std: Tensor
    heads: Tensor

    def __init__(
        self,
        net: str = "vgg",
        *,
        pooling: str | None = None,
        trunk_weights: Weights | None = None,
        head_weights: Weights | None = None,
        pretrained: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.choice("net", net, tuple(_TRUNKS))
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or None, got {dtype}")
        self.dtype = dtype
        self.net = net
        self.pooling = _TRUNKS[net].pooling if pooling is None else pooling
        _check.choice("pooling", self.pooling, ("avg", "max"))
        self.trunk = _make_trunk(net, self.pooling, trunk_weights, pretrained)
        self.register_buffer("heads", _make_heads(net, head_weights, pretrained), persistent=False)
        for name, values in ("mean", IMAGENET_MEAN), ("std", IMAGENET_STD):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self._on_cpu = perceptual_cpu.Trunk()
        if dtype is not None:
            self.trunk.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "LPIPS":
        """What `.to()` and its kin do to the weights, and on the way to a GPU the default dtype there."""
        comes = not self.heads.is_cuda
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no types
        self._on_cpu = perceptual_cpu.Trunk()  # without what was kept of the weights before
        if comes and self.heads.is_cuda and self.dtype is None and self._trunk_dtype == torch.float32:
            self.trunk.to(torch.bfloat16)
        return self

    @property
    def _trunk_dtype(self) -> torch.dtype:
        return next(self.trunk.buffers()).dtype

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(
            self,
            x: Tensor,
            target: Tensor,
            *,
            resize: bool = True,
            value_range: tuple[float, float] = (-1.0, 1.0),
        ) -> Tensor: ...

    def forward(
        self,
        x: Tensor,
        target: Tensor,
        *,
        resize: bool = True,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> Tensor:
        """The distance of each pair of images [B], in float32; in float64 after `.double()`.

        `resize` is what the losses of consistency models do: images narrower than 256 become 224 x 224,
        bilinearly. Turn it off to measure images at their own size, as other LPIPS packages do.

        Images in half precision are resized and normalized in float32. Autocast runs the trunk in its own half
        precision; the distances still accumulate in float32. A target that needs no gradient costs no graph.

        Args:
            x, target: [B, 3, H, W], or [B, 1, H, W] for gray, which counts as R = G = B.
            value_range: the values that stand for black and for full intensity, in both.
        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device; the message names it.
        """
        _check.float_tensor("x", x)
        _check.float_tensor("target", target)
        _check.same_shape(x=x, target=target)
        for name, image in ("x", x), ("target", target):
            self._check_weights_fit(name, image)
        size = _resized(x) if resize else None
        self._check_image_shape(x, size is not None)
        value_range_of(value_range)

        measure = functools.partial(self._measure, size=size, value_range=value_range)
        if len(x) and perceptual_cpu.serves(x, target, list(self.buffers()), self.trunk):
            count = perceptual_cpu.at_once(*((size, size) if size else x.shape[2:]))
            return perceptual_cpu.in_parts(functools.partial(measure, run=self._on_cpu), x, target, count)
        return measure(x, target)

    def _measure(
        self,
        x: Tensor,
        target: Tensor,
        *,
        size: int | None,
        value_range: tuple[float, float],
        run: Callable[[nn.Module, Tensor], Tensor] = lambda layer, h: layer(h),
    ) -> Tensor:
        """The distances [B]; run: a layer of the trunk."""
        images = [x, target]
        if not (torch.is_grad_enabled() and (x.requires_grad or target.requires_grad)):
            # No graph: one pass of the trunk for both.
            images = [torch.cat(images)]
        trunk, dtype = _TRUNKS[self.net], self._trunk_dtype
        heads = iter(self.heads.split(trunk.channels))
        maps = [
            lpips_input(
                image, self.mean, self.std, size=size, value_range=value_range, dtype=dtype,
                memory_format=torch.channels_last,
            )
            for image in images
        ]  # fmt: skip
        distances = []
        for i, layer in enumerate(self.trunk):
            maps = [run(layer, each) for each in maps]
            if i in trunk.layers:
                features, target_features = maps if len(maps) == 2 else maps[0].tensor_split(2)
                distances.append(lpips_layer(features, target_features, next(heads)))
        return torch.stack(distances).sum(0)

    def _check_weights_fit(self, name: str, image: Tensor) -> None:
        device, dtype = self.mean.device, self.mean.dtype
        if image.device != device:
            raise ValueError(f"{name} is on {image.device}, the weights of LPIPS on {device}: move one")
        if image.dtype == torch.float64 and dtype != torch.float64:
            raise TypeError(f"{name} is float64, the weights of LPIPS are {dtype}: call .double() on it")

    def _check_image_shape(self, x: Tensor, resize: bool) -> None:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x must be [B, 3, H, W] or [B, 1, H, W], got {list(x.shape)}")
        least = 1 if resize else _TRUNKS[self.net].min_size
        if min(x.shape[2:]) < least:
            raise ValueError(f"x must be {least} or more high and wide for {self.net!r}, got {list(x.shape)}")


def _make_trunk(net: str, pooling: str, weights: Weights | None, pretrained: bool) -> nn.Sequential:
    """The layers of `net` up to the last that is compared, frozen. None acts differently in training."""
    try:
        import torchvision.models
    except ImportError as error:
        raise ImportError('LPIPS needs torchvision for its trunk: pip install "cmfast[lpips]"') from error

    spec = _TRUNKS[net]
    with torch.device("meta"):  # allocates nothing: most of VGG-16 is its classifier, which is not used
        features = getattr(torchvision.models, spec.model)().features
    trunk = features[: spec.layers[-1] + 1].to_empty(device="cpu").eval()

    if weights is None and pretrained:
        weights = _download(getattr(torchvision.models, spec.weights).IMAGENET1K_V1)
    if weights is None:
        _randomize(trunk)
    else:
        _load(trunk, weights, spec.model)

    if pooling == "avg":
        for i, layer in enumerate(trunk):
            if isinstance(layer, nn.MaxPool2d):
                trunk[i] = nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
    _parameters_to_buffers(trunk)
    return trunk.to(memory_format=torch.channels_last)


def _make_heads(net: str, weights: Weights | None, pretrained: bool) -> Tensor:
    """The linear weights of all layers of `net` in one float32 vector, layer after layer."""
    channels = _TRUNKS[net].channels
    if weights is None and not pretrained:
        return torch.ones(sum(channels))
    if weights is None:
        package = importlib.util.find_spec("lpips")  # only finds the folder: the import pulls in scipy
        if package is None or not package.submodule_search_locations:
            raise ImportError('LPIPS needs the linear weights of lpips: pip install "cmfast[lpips]"')
        weights = Path(package.submodule_search_locations[0], "weights", "v0.1", f"{net}.pth")

    weights = _read("head_weights", weights)
    names = [f"lin{i}.model.1.weight" for i in range(len(channels))]
    heads = [weights[name].detach().flatten().float() for name in names if name in weights]
    if tuple(map(len, heads)) != channels:
        raise ValueError(
            f"head_weights must hold {names[0]} to {names[-1]} of {channels} channels, "
            f"as {net}.pth of the lpips package does, got {tuple(map(len, heads))}"
        )
    return torch.cat(heads)


def _load(trunk: nn.Sequential, weights: Weights, model: str) -> None:
    weights = {k.removeprefix("features."): v for k, v in _read("trunk_weights", weights).items()}
    for name, parameter in trunk.state_dict().items():
        if name not in weights or weights[name].shape != parameter.shape:
            got = list(weights[name].shape) if name in weights else "no such entry"
            raise ValueError(
                f"trunk_weights must be those of torchvision's {model}, "
                f"with features.{name} {list(parameter.shape)}, got {got}"
            )
    trunk.load_state_dict(weights, strict=False)  # what is left over is the classifier's


def _read(name: str, weights: Weights) -> Mapping[str, Tensor]:
    if isinstance(weights, str | os.PathLike):
        weights = _read_file(name, Path(weights), "fetch it again")
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} must be a state dict or the path of one, got {type(weights).__name__}")
    return weights


def _read_file(name: str, path: Path, advice: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle leads its reader to whatever
        raise ValueError(
            f"{name}: {path} is no file of weights, or is cut short or damaged ({type(error).__name__}): {advice}"
        ) from error


def _download(weights: Any) -> Mapping[str, Tensor]:
    """The state dict of `weights`, a member of one of torchvision's enumerations."""
    cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if cached.is_file():  # its hash is looked at only when it is fetched
        advice = "remove it, and it is downloaded again"
        return _read_file("the trunk's weights", cached, advice)
    try:
        return weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"cannot download the weights of LPIPS's trunk ({error}). "
            f"Fetch {weights.url} on another machine and put it at {cached}, "
            f'or pass its path: LPIPS(..., trunk_weights="{cached.name}").'
        ) from error


def _randomize(trunk: nn.Module) -> None:
    for name, parameter in trunk.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)


def _parameters_to_buffers(trunk: nn.Module) -> None:
    for module in trunk.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)
