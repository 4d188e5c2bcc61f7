"""Loading and saving: a `Denoiser` from the original's `.pt` files, from ours, and from diffusers models."""

from __future__ import annotations

import inspect
import json
import numbers
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cmfast import unet_config, untrusted
from cmfast.denoiser import Denoiser
from cmfast.ops import _check
from cmfast.precondition import PRECONDITIONINGS, Preconditioner, overridden
from cmfast.unet import UNetModel
from cmfast.whole import written_whole

#: The bundled model.
BUNDLED = Path(__file__).parent / "assets" / "mnist.safetensors"

#: Keywords of `load` that describe the noise levels; every other one is an argument of `UNetModel`.
SCHEDULE_KEYWORDS = ("sigma_data", "sigma_min", "sigma_max", "rho")
NETWORK_KEYWORDS = tuple(inspect.signature(UNetModel).parameters)

_HEADER_KEY = "cmfast"
_VERSION = 1
#: The most that a header of safetensors may have.
_HEADER_BYTES = 100_000_000
_DTYPES = untrusted.DTYPES
# Names of wrappers that add themselves in front of every tensor's name: DDP, torch.compile, Denoiser.
_PREFIXES = ("module.", "_orig_mod.", "network.")


class CheckpointError(ValueError):
    """A file that cannot be loaded or a model that cannot be saved, with the reason."""


def load(
    path: str | os.PathLike[str] | nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    preconditioning: str | None = None,
    convert: bool = False,
    **overrides: Any,
) -> Denoiser:
    """A `Denoiser` in evaluation mode.

    Args:
        path: what to load; None: the bundled model.
            - A `.pt` file of the original code: a state dict, read without executing anything it contains. The
              network's arguments are found from names and shapes.
            - A safetensors file: one that `save` wrote, or bare weights as above.
            - A folder of diffusers (a pipeline or a UNet2DModel), or such an object, which is wrapped, not copied.
        device: where the model goes. Default: the CPU; an object stays where it is.
        dtype: None: that of the file. float16, bfloat16: of the convolutions between the first and the last, as in
            the original's fp16 mode; the rest becomes float32. float32, float64: of everything.
        preconditioning: "consistency" or "edm". Default: what the file says; bare weights are a consistency model,
            except where the file's name starts with `edm_` (the published teachers).
        convert: of a diffusers model, make a `UNetModel` with a copy of the weights, which `save` writes too, instead
            of wrapping its UNet2DModel.
        overrides: arguments of `UNetModel`, and sigma_data, sigma_min, sigma_max, rho, where they differ from what
            the file says or what is missing there: weights do not show `image_size` and `num_head_channels`
            (or `num_heads`), which are known for the published models and must be given for others. `num_heads`
            takes the place of a `num_head_channels` that the file says.

    Raises:
        FileNotFoundError, PermissionError: the file cannot be read.
        CheckpointError (a ValueError): not a checkpoint, or not one of this network, with what to check.
        ValueError: an unknown preconditioning, dtype or device. TypeError: an unknown keyword.
        ImportError: a diffusers model, without diffusers.

    >>> import tempfile
    >>> network = UNetModel(8, 3, 32, 3, 1, [2], channel_mult=(1, 2), num_head_channels=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Denoiser(network, sigma_max=70.0), f"{folder}/model.safetensors")
    ...     model = load(f"{folder}/model.safetensors")
    >>> model.sigma_max, model.network.config["channel_mult"]
    (70.0, [1, 2])
    """
    if preconditioning is not None and preconditioning not in PRECONDITIONINGS:
        known = ", ".join(PRECONDITIONINGS)
        raise ValueError(f"unknown preconditioning {preconditioning!r}; known: {known}")
    _check_dtype(dtype)
    unknown = [name for name in overrides if name not in NETWORK_KEYWORDS + SCHEDULE_KEYWORDS]
    if unknown:
        known = ", ".join(SCHEDULE_KEYWORDS + NETWORK_KEYWORDS)
        raise TypeError(f"load() got an unknown keyword {', '.join(unknown)}; known: {known}")

    heads = ("num_heads", "num_head_channels", "num_heads_upsample")
    for name in ("image_size", "dropout", *heads, *SCHEDULE_KEYWORDS):
        value = overrides.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
    image_size = overrides.get("image_size", 1)
    if not isinstance(image_size, numbers.Integral) or not 1 <= int(image_size) <= untrusted.COUNTS:
        raise ValueError(f"image_size must be from 1 to {untrusted.COUNTS:,}, got {image_size!r}")
    if device is not None:
        device = _device(device)

    if path is None and not BUNDLED.is_file():
        raise FileNotFoundError(f"the bundled model is missing from this installation: {BUNDLED}")
    source = BUNDLED if path is None else path
    network, settings = _read(source, overrides, convert)
    settings |= {name: overrides[name] for name in SCHEDULE_KEYWORDS if name in overrides}
    if "image_size" in overrides:
        settings.pop("image_shape", None)
    denoiser = _denoiser(source, network, settings, preconditioning)
    if device is not None:
        denoiser.to(device)
    return _cast(denoiser, dtype, settings)


def load_teacher(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, convert: bool = False
) -> Denoiser:
    """The diffusion model that a distillation starts from, as `load` reads it; but weights that do not say what they
    are count as one, whatever the file is called, as in the original's `cm_train.py`.

    Raises: CheckpointError: the file says that it holds a consistency model; and as `load`.
    """
    network, settings = _read(path, {}, convert)
    # A scheduler of diffusers, which gives noise levels, is that of a consistency model.
    if settings.get("boundary", settings.get("sigma_min")) or settings.get("consistency") is True:
        raise CheckpointError(
            f"{path} is a consistency model, and a teacher is a diffusion model: what leads from noise to an image in "
            "one step gives no path to follow. Name the model that it was distilled from, or one of recipe edm"
        )
    return _cast(_denoiser(path, network, settings, "edm"), dtype, settings)


def save(
    denoiser: Denoiser, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, consistency: bool = False
) -> None:
    """Write a `Denoiser` around a `UNetModel` to a safetensors file that `load` reads without further arguments.

    The file appears complete or not at all: it is written beside `path` under another name, flushed to the disk,
    then renamed. A file that was there before stays as it was if anything fails.

    Args:
        denoiser: it, or its network, may be wrapped by torch.compile. path: where to; `.safetensors` by custom.
        dtype: None: every tensor as it is, so that loading gives the same bits. Otherwise the dtype in the file
            only: `load` converts back to the dtype that the model has now.
        consistency: have the file say that it is a consistency model, and so no teacher, where its scalings do not:
            of one that ECT has tuned they are a diffusion model's.

    Raises:
        CheckpointError: the network is not a `UNetModel`. ValueError: an unknown dtype.
        FileNotFoundError, IsADirectoryError, PermissionError, OSError: the file cannot be written.

    >>> import tempfile
    >>> network = UNetModel(8, 3, 32, 3, 1, [], channel_mult=(1,))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Denoiser(network), f"{folder}/half.safetensors", dtype=torch.float16)
    ...     load(f"{folder}/half.safetensors").network.dtype
    torch.float32
    """
    model: Any = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile wraps
    network = getattr(model, "network", None)
    network = getattr(network, "_orig_mod", network)
    if not isinstance(model, Denoiser) or not isinstance(network, UNetModel):
        what = f"holds a {type(network).__name__}" if isinstance(model, Denoiser) else f"is a {type(model).__name__}"
        raise CheckpointError(f"only a Denoiser around a UNetModel can be saved, this one {what}")
    _check_dtype(dtype)

    header: dict[str, Any] = {
        "version": _VERSION,
        "network": network.config,
        "sigma_data": denoiser.preconditioner.sigma_data,
        "boundary": denoiser.preconditioner.boundary,
        "sigma_min": denoiser.sigma_min,
        "sigma_max": denoiser.sigma_max,
        "rho": denoiser.rho,
        "image_shape": denoiser.image_shape,
        "num_classes": denoiser.num_classes,
        **({} if denoiser.bounded else {"bounded": False}),
        **({"consistency": True} if consistency else {}),
    }
    if methods := overridden(model.preconditioner):
        warnings.warn(
            f"{path} gets sigma_data and boundary, and {type(model.preconditioner).__name__} overrides "
            f"{' and '.join(methods)}: after load(), set the model's preconditioner to yours",
            stacklevel=2,
        )
    state = network.state_dict()
    if dtype is not None:
        header["dtype"] = str(network.dtype).removeprefix("torch.")
        # Else of the torso, as a dtype given to `load` is.
        header["whole"] = all(tensor.dtype == network.dtype for tensor in state.values())
    tensors = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in state.items()}
    write_tensors(tensors, path, {_HEADER_KEY: json.dumps(header, default=_plain_number)})


def _plain_number(value: Any) -> Any:
    """For JSON, a number of NumPy's as Python's: an argument of the network may be one."""
    number = _check.without_numpy(value)
    if number is value:
        raise TypeError(f"a {type(value).__name__} among the arguments of a network: {value!r}")
    return number


def write_tensors(
    tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by their names, and metadata beside them, to a file of safetensors at `path`, whole or not at all.

    Raises: OSError: it cannot be written.
    """
    dense, places = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        # Weights that are tied are one memory by two names, and a file takes memory by one alone.
        dense[name] = tensor.clone(memory_format=torch.contiguous_format) if place in places else tensor.contiguous()
        places.add(place)
    with written_whole(path) as file:
        mode = file.stat().st_mode
        try:
            save_file(dense, file, metadata)
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"cannot write {path}: {str(error).strip()}") from error
        file.chmod(mode)  # save_file leaves a file that only its owner may read


def _check_dtype(dtype: object) -> None:
    """Raises: ValueError: neither None nor one of weights."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, _DTYPES))}, or None")


def _device(device: torch.device | str) -> torch.device:
    """Raises: ValueError: there is none such."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: expected one of PyTorch's, such as cuda, cuda:0 or cpu") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: torch finds {torch.cuda.device_count()} GPUs here")
    return found


def _read(source: Any, overrides: Mapping[str, Any], convert: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what comes with it."""
    if not isinstance(source, str | os.PathLike) or Path(source).is_dir():
        return _read_diffusers(source, overrides, convert)
    if convert:
        raise TypeError(f"convert=True is for diffusers models, an object or a folder, and {source} is neither")
    return _read_file(Path(source), overrides)


def _read_diffusers(source: Any, overrides: Mapping[str, Any], convert: bool) -> tuple[nn.Module, dict[str, Any]]:
    for name in overrides:
        if name not in SCHEDULE_KEYWORDS:
            raise TypeError(f"{name} does not apply to a diffusers model, which knows its architecture")
    from cmfast.compat.diffusers import read_network  # an optional extra, and a layer above this one

    return read_network(source, convert=convert)


def _read_file(path: Path, overrides: Mapping[str, Any]) -> tuple[UNetModel, dict[str, Any]]:
    """The network on the CPU, and the file's settings."""
    tensors, settings = _read_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    arguments = {name: value for name, value in overrides.items() if name in NETWORK_KEYWORDS}
    try:
        untrusted.check_tensors(tensors, path.stat().st_size)
        config = settings.pop("network", None) or unet_config.from_shapes(shapes)
        if config.get("num_head_channels", -1) != -1 and {"num_heads", "num_heads_upsample"} & arguments.keys():
            # It would win over them. Numbers of heads beside it say nothing.
            config = {name: value for name, value in config.items() if not name.startswith("num_head")}
        config = config | arguments
        untrusted.check_network(config, len(tensors))
        network = _build_network(config)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error

    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    difference = unet_config.disagreement(expected, shapes)
    if difference:
        raise CheckpointError(f"{path} does not fit the network: {difference}")
    # Not those of the file: it may be written again, even with these weights, or cut off.
    network.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    for name, tensor in tensors.items():
        if tensor.numel() and not all(value.isfinite() for value in tensor.aminmax()):
            warnings.warn(f"{path}: {name} has values that are NaN or infinite, and so are its images", stacklevel=4)
            break
    if path.name.startswith("edm_"):
        settings.setdefault("boundary", 0.0)
    return network, settings


def _build_network(config: dict[str, Any]) -> UNetModel:
    """On the meta device: the weights come from the file, so none are initialised."""
    missing = [] if "image_size" in config else ["image_size="]
    if not {"num_head_channels", "num_heads"} & config.keys():
        missing.append("num_head_channels= (or num_heads=)")
    if missing:
        raise ValueError(
            f"weights do not show {' and '.join(missing)}, and this is not a published architecture: pass "
            "them by name, as in load(path, image_size=32, num_head_channels=64), or to sample as in --set "
            "image_size=32 --set num_head_channels=64. train takes no such argument, but a file that says them: "
            'cmfast.save(cmfast.load(path, ...), "model.safetensors"), a teacher loaded with preconditioning="edm"'
        )
    network: UNetModel = meta_network(config)
    if network.in_channels != network.out_channels:
        raise ValueError(
            f"the network makes {network.out_channels} channels from {network.in_channels} (a learned "
            "variance?), but a Denoiser needs as many out as in"
        )
    return network


def meta_network(config: Mapping[str, Any], network_class: Callable[..., Any] = UNetModel) -> Any:
    """`network_class(**config)` on the meta device: names and shapes, no memory, nothing initialised."""
    with torch.device("meta"), _SkipNormal():
        return network_class(**config)


class _SkipNormal(TorchFunctionMode):
    """No `nn.init.normal_`: its first call on the meta device imports torch's compiler, which takes two seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def _denoiser(source: Any, network: nn.Module, settings: dict[str, Any], preconditioning: str | None) -> Denoiser:
    try:
        return _build_denoiser(network, settings, preconditioning).eval()
    except ValueError as error:
        what = source if isinstance(source, str | os.PathLike) else type(source).__name__
        raise CheckpointError(f"{what}: {error}") from error


def _build_denoiser(network: nn.Module, settings: dict[str, Any], preconditioning: str | None) -> Denoiser:
    schedule = {name: settings[name] for name in ("sigma_min", "sigma_max", "rho") if name in settings}
    sigma_data = settings.get("sigma_data", 0.5)
    boundary = settings.get("boundary")
    if preconditioning is not None or boundary is None:
        preconditioner = Preconditioner.by_name(
            preconditioning or "consistency",
            sigma_data=sigma_data,
            sigma_min=schedule.get("sigma_min", 0.002),
        )
    else:
        preconditioner = Preconditioner(sigma_data, boundary)
    image_shape = settings.get("image_shape")
    if image_shape is None and isinstance(network, UNetModel) and network.dims == 2:
        image_shape = (network.in_channels, network.image_size, network.image_size)
    return Denoiser(
        network,
        preconditioner,
        **schedule,
        image_shape=image_shape,
        num_classes=settings.get("num_classes"),
        bounded=settings.get("bounded", True),
    )


def _cast(denoiser: Denoiser, dtype: torch.dtype | None, settings: Mapping[str, Any]) -> Denoiser:
    """In the dtype that is given, or else that of the settings."""
    whole = dtype is None and settings.get("whole") is True
    dtype = dtype or settings.get("dtype")
    if dtype in (torch.float16, torch.bfloat16) and not whole and isinstance(denoiser.network, UNetModel):
        denoiser.network.float().convert_torso(dtype)
    elif dtype is not None:
        denoiser.to(dtype)
    return denoiser


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a file, and the settings of its cmfast header, if it has one."""
    start = _first_bytes(path)
    # A safetensors file is an 8-byte length and JSON.
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path, start)
    return _strip_prefixes(_state_dict(path, read_pickle(path, map_location="cpu"))), {}


def _first_bytes(path: Path) -> bytes:
    if not path.exists():
        if re.match(r"[a-z0-9]+:/", text := str(path)):  # of the two slashes of an address a Path keeps one
            raise FileNotFoundError(f"{text.replace(':/', '://', 1)} is an address, not a file: download it first")
        message = f"no such checkpoint: {path}"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.suffix and not path.parent.exists():
            message += f"; of a model of the Hub give its folder: hf download {path} --local-dir {path.name}"
        raise FileNotFoundError(message)
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is no regular file")  # to read a pipe is to wait
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty")
    return start


def _read_safetensors(path: Path, start: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    length = int.from_bytes(start[:8], "little")
    if length > _HEADER_BYTES:  # else it would be read first
        raise CheckpointError(_damaged(path, "safetensors", start, f"a header of {length:,} bytes"))
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(_damaged(path, "safetensors", start, error)) from error
    if header is None:
        return _strip_prefixes(tensors), {}
    try:
        settings = json.loads(header)
        version = settings["version"]
        if version > _VERSION:
            raise CheckpointError(f"{path} has format {version}, this cmfast reads up to {_VERSION}: update it")
        untrusted.check_settings(settings)
        if "dtype" in settings:
            settings["dtype"] = {str(dtype): dtype for dtype in _DTYPES}[f"torch.{settings['dtype']}"]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {_HEADER_KEY!r} header is damaged ({error!r})") from error
    return tensors, settings


def read_pickle(path: Path, **options: Any) -> Any:
    """What `torch.save` wrote: tensors and plain containers, read without executing anything the file contains.

    Args: path: the file; options: of `torch.load`, such as map_location.
    Raises: FileNotFoundError; CheckpointError: empty, damaged, or with pickled Python objects in it.
    """
    start = _first_bytes(path)
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            untrusted.check_archive(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointError(_damaged(path, "PyTorch", start, error)) from error
    try:
        # mmap needs the format of PyTorch 1.6; with it, only what is used is read from the disk.
        return torch.load(path, **{"mmap": zipped, **options, "weights_only": True})
    except pickle.UnpicklingError as error:
        if not re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            # Torch's own text is about its security setting, which is not what is wrong here.
            raise CheckpointError(_damaged(path, "PyTorch", start, "no pickled data")) from error
        raise CheckpointError(
            f"{path} holds pickled Python objects besides tensors; loading those could run any code, so it was "
            "refused. If you trust the file, make one of weights alone from it: content = torch.load(path, "
            "weights_only=False), then torch.save(content.state_dict(), 'weights.pt') of a model, or "
            "torch.save(content['model'], 'weights.pt') of a dictionary, in which content.keys() says their name"
        ) from error
    except Exception as error:  # a damaged pickle leads its reader to whatever
        raise CheckpointError(_damaged(path, "PyTorch", start, error)) from error


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict")
    others = [str(k)[:80] for k, v in content.items() if not isinstance(v, Tensor) or not isinstance(k, str)]
    if others:
        raise CheckpointError(
            f"{path} is not a state dict: {', '.join(others[:3])} {'is' if len(others) == 1 else 'are'} no tensor"
            f"{_within(content)}"
        )
    return dict(content)


def _within(content: Mapping[Any, Any]) -> str:
    """Where in it there are weights, which nobody but its user can choose between: `ema`, `model_state_dict`."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value and all(isinstance(each, Tensor) for each in value.values()):
            return f"; make a file of its weights: torch.save(torch.load(path)[{key!r:.80}], 'weights.pt')"
    return ""


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _strip_prefixes({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def _damaged(path: Path, kind: str, start: bytes, error: Exception | str) -> str:
    reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
    return f"{path} is no {kind} file, or is cut short or damaged ({reason}); it begins with {start[:24]!r}"
