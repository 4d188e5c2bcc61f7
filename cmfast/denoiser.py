"""A network with its preconditioning, and how solvers see a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmfast import ops
from cmfast.ops import _check
from cmfast.precondition import Preconditioner, overridden
from cmfast.reference._common import as_input

#: A larger rho is no other in effect: levels are evenly spaced in log sigma.
RHO_MAX = 1e6

#: D(x, sigma) or D(x, sigma, labels): a denoised batch from a noisy one.
DenoiserFn = Callable[..., Tensor]


class Denoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): Song et al. 2023, eq. 5.

    Args:
        network: F(x, timesteps) or, if class-conditional, F(x, timesteps, labels); [B, C, ...] to the same shape. x has
            the network's `input_dtype`, if it has one, or the dtype of its first parameter of 16 bits or more.
            Parameters are seen of a module alone: a function, `functools.partial` included, stays on its device, in its
            mode, and has x in the dtype of the batch.
        preconditioner: default: that of a consistency model.
        sigma_min, sigma_max, rho: the noise levels the model was trained for, used by schedules.
        image_shape: (C, H, W) the model makes, or (C, ...) of a signal or a video; None if not known.
        num_classes: number of classes; None: unconditional. Default: the network's own `num_classes`, if it has one, of
            which 0 or less is none.
        bounded: whether the data lie in [-1, 1]. False, of latents, say: samplers clamp nothing, and make no pixels.

    Raises: ValueError: not 0 < sigma_min < sigma_max, a rho that makes no noise levels of them, or num_classes below 1.
        TypeError: an image_shape or num_classes that are no whole numbers, another argument that is no number, a
            network that is a Denoiser or nothing to call, or a preconditioner that is none.

    >>> denoiser = Denoiser(lambda x, t: torch.zeros_like(x))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> bool((denoiser(x, 0.002) == x).all())
    True
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        preconditioner: Preconditioner | None = None,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        image_shape: tuple[int, ...] | None = None,
        num_classes: int | None = None,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(network, Denoiser):
            raise TypeError("network is a Denoiser already, whose output would be scaled twice: take it as it is")
        if not callable(network):
            raise TypeError(f"network must be F(x, timesteps), a module or a function, got {type(network).__name__}")
        if not isinstance(preconditioner, Preconditioner | None):
            raise TypeError(f"preconditioner must be a cmfast.Preconditioner or None, got {preconditioner!r}")
        for name, value in {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}.items():
            _check.real(name, value)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        # sigma ** (1 / rho) is then a number, and far enough from 1 to tell levels apart.
        if not (0 < rho <= RHO_MAX and max(abs(math.log(sigma)) for sigma in (sigma_min, sigma_max)) < 700 * rho):
            raise ValueError(f"rho must be above 0, 7 mostly, with sigma ** (1 / rho) a number, got {rho}")
        self.network = network
        self.preconditioner = preconditioner or Preconditioner.consistency(sigma_min=sigma_min)
        # Numbers of Python's own, which a file can hold: NumPy's in float32 would make other levels, too.
        self.sigma_min, self.sigma_max, self.rho = float(sigma_min), float(sigma_max), float(rho)
        sizes = () if image_shape is None else image_shape
        self.image_shape = tuple(_check.whole("image_shape", size) for size in sizes) or None
        if num_classes is not None:
            self.num_classes: int | None = _check.whole("num_classes", num_classes, least=1)
        else:
            self.num_classes = stated_classes(network)
        self.bounded = _check.flag("bounded", bounded)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype the network takes its input in: what it says, or that of its first floating parameter, or None."""
        return input_dtype(self.network)

    @property
    def input_format(self) -> torch.memory_format | None:
        """The layout the network wants its input in; None if it does not say."""
        return stated(self.network, "input_format")

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU if there are none."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(
            self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, *, clip: bool = False
        ) -> Tensor: ...

    def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, *, clip: bool = False) -> Tensor:
        """The denoised batch [B, C, H, W] in the dtype of x.

        Args: x [B, C, H, W] noisy, data units; sigma [B], scalar or number; labels int64 [B] if class-conditional;
            clip: clamp to [-1, 1].
        Raises: ValueError: sigma with other dimensions, negative or NaN; labels missing, not wanted, of the wrong
            shape or out of range (values are looked at on the CPU only).
        """
        if not isinstance(sigma, Tensor):
            _check.real("sigma", sigma)
            sigma = torch.tensor(float(sigma), dtype=_check.sigma_dtype(x), device=x.device)
        self.check_labels(labels, x.shape[0])
        if overridden(self.preconditioner):
            return self._by_methods(x, sigma, labels, clip)
        sigma_data, boundary = self.preconditioner.sigma_data, self.preconditioner.boundary
        options: dict[str, Any] = {"dtype": self.input_dtype, "memory_format": self.input_format}
        model_input, c_noise = ops.scale_input(x, sigma, sigma_data=sigma_data, **options)
        model_output = self.network_output(model_input, c_noise, labels)
        return ops.denoise(model_output, x, sigma, sigma_data=sigma_data, boundary=boundary, clip=clip)

    def _by_methods(self, x: Tensor, sigma: Tensor, labels: Tensor | None, clip: bool) -> Tensor:
        """`forward` with the preconditioner's own `scalings` and `c_noise`."""
        _check.float_tensor("x", x)
        _check.sigma_level("sigma", sigma, x)
        wide = _check.sigma_dtype(x)
        levels = sigma.to(wide)
        parts = (_tensor(c, levels) for c in self.preconditioner.scalings(levels))
        c_skip, c_out, c_in = (c.to(wide).reshape(c.shape + (1,) * (x.ndim - c.ndim)) for c in parts)
        model_input = as_input(c_in * x.to(wide), self.input_dtype or x.dtype, self.input_format)
        c_noise = _tensor(self.preconditioner.c_noise(levels), levels).expand(x.shape[0])
        model_output = self.network_output(model_input, c_noise, labels)
        denoised = c_skip * x.to(wide) + c_out * model_output.to(wide)
        return (denoised.clamp(-1, 1) if clip else denoised).to(x.dtype)

    def check_labels(self, labels: Tensor | None, batch: int) -> None:
        """ValueError unless `labels` fit this model and a batch of that size."""
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels were given to an unconditional model: leave them out")
            return
        wanted = f"labels must be int64 [B] with B = {batch} and values from 0 to {self.num_classes - 1}"
        if labels is None:
            raise ValueError(f"labels are missing and the model is class-conditional: {wanted}")
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{wanted}, got {getattr(labels, 'dtype', type(labels).__name__)}")
        if labels.shape != (batch,):
            raise ValueError(f"{wanted}, got {list(labels.shape)}")
        if labels.device.type == "cpu" and labels.numel() and _check.has_values(labels):
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"{wanted}, got values from {low} to {high}")

    def network_output(self, model_input: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """F(c_in x, c_noise) [B, C, H, W]: the network alone, on a model_input that is scaled already; labels int64
        [B].

        Raises: TypeError: the network returned no tensor.
        """
        c_noise = c_noise if getattr(self.network, "is_network", False) else _writable(c_noise)
        labelled = () if labels is None else (labels,)
        return _output(self.network(model_input, c_noise, *labelled), self.network)


def denoise_with(
    network: Callable[..., Tensor], x: Tensor, sigma: Tensor, scalings: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(F, D), [B, C, H, W], with given c_skip, c_out, c_in (scalars or [B]): for scalings that are not a
    `Preconditioner`'s.

    network: F(x, timesteps); x [B, C, H, W]; sigma [B], in data units.
    """
    c_skip, c_out, c_in = (c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) for c in scalings)
    model_output = network(c_in * x, ops.c_noise(sigma).expand(x.shape[0]))
    return model_output, c_skip * x + c_out * model_output


def _output(output: Any, network: object) -> Tensor:
    """What a network or model returned. Raises: TypeError: that is no tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{getattr(network, '__name__', type(network).__name__)} must return a torch.Tensor like x, got "
            f"{type(output).__name__}: return the tensor in it; of a UNet2DModel cmfast.load makes a Denoiser"
        )
    return output


def _writable(c_noise: Tensor) -> Tensor:
    """c_noise [B] for a model that may scale it in place: that of one level is one number in memory, and other models
    are told of the same."""
    return c_noise.clone(memory_format=torch.contiguous_format)


def _tensor(c: Any, levels: Tensor) -> Tensor:
    """A scaling, or a plain number in the place of one, with the dtype and device of levels."""
    return c if isinstance(c, Tensor) else levels.new_full((), c)


def stated(network: Any, name: str) -> Any:
    """What a model or network says of itself under a name, or the one that a wrapper such as
    `DistributedDataParallel` holds does; None if it does not."""
    value = getattr(network, name, None)
    inner = getattr(network, "module", None)
    return stated(inner, name) if value is None and isinstance(inner, nn.Module) else value


def input_dtype(model: Any) -> torch.dtype | None:
    """The dtype a model or network takes its input in: what it says, or that of its first parameter in one that batches
    have, or None. Weights in float8 are stored in it, not computed with."""
    own: torch.dtype | None = stated(model, "input_dtype")
    parameters = model.parameters() if own is None and isinstance(model, nn.Module) else ()
    return next((p.dtype for p in parameters if p.dtype in _check.DTYPES), own)


def stated_classes(network: Any) -> int | None:
    """The number of classes that a model or network says it has; None if it does not, or says 0 or less.

    Raises: TypeError: that is no whole number.
    """
    said = stated(network, "num_classes")
    count = 0 if said is None else _check.whole("num_classes of the network", said)
    return count if count > 0 else None


def noise_range(model: object) -> dict[str, Any]:
    """sigma_min, sigma_max and rho, as far as the model says them, and they can be those of levels: the networks of
    NVlabs/edm say 0 and infinity, for any."""
    said = {name: stated(model, name) for name in ("sigma_min", "sigma_max", "rho")}
    return {name: value for name, value in said.items() if _is_level(value)}


def _is_level(value: Any) -> bool:
    if isinstance(value, Tensor):  # which is not read here
        return True
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def is_bounded(model: object) -> bool:
    """Whether what a model makes lies in [-1, 1]: unless it says that it does not."""
    return stated(model, "bounded") is not False


def _intercepted(model: Denoiser) -> bool:
    """Whether a call of this Denoiser runs more than its class says: hooks of its own (those of `fully_shard`, too),
    another `forward`, or what `model.compile()` made."""
    own = vars(model)
    replaced = "forward" in own or own.get("_compiled_call_impl") is not None
    return replaced or bool(own["_forward_hooks"]) or bool(own["_forward_pre_hooks"])


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside the `with` block matrices on that device are multiplied in their own dtype."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def unfused(model: object) -> str | None:
    """Why a Denoiser's own scalings are not what steps compute with; None if they are."""
    if not isinstance(model, Denoiser) or not (methods := overridden(model.preconditioner)):
        return None
    owner = type(model.preconditioner).__name__
    return f"{owner} overrides {' and '.join(methods)}: each step calls for D, which is plain PyTorch"


def check_model(model: object) -> None:
    """Raises: TypeError: a network F(x, timesteps) in the place of D(x, sigma), which takes the same arguments; or what
    cannot be called, a file's name say."""
    if isinstance(model, str | os.PathLike):
        raise TypeError(f"the model is a path, {os.fspath(model)!r}: cmfast.load makes a model of the file")
    if not callable(model):
        raise TypeError(f"the model must be a Denoiser, or D(x, sigma), got {type(model).__name__}")
    if getattr(model, "is_network", False):
        raise TypeError(
            f"the model is a {type(model).__name__}, a network F(x, timesteps): wrap it in cmfast.Denoiser(network), "
            "which makes D(x, sigma) of it"
        )


class Evaluator:
    """A model as solvers and losses see it: scaled input in, network output out, and the scalings between.

    A `Denoiser` is evaluated through its network, so that a step can be computed from the network's output without
    storing D. Anything else that maps (x, sigma[, labels]) to a denoised batch, counts as a network that is itself the
    denoiser: a wrapped or overridden Denoiser, or one whose preconditioner has methods of its own, included.

    `dtype` is what the model is given its input in; default: what a Denoiser's network takes, else that of the state.
    `labels` int64 [B] go with every call, `clip` clamps D to [-1, 1].
    """

    def __init__(
        self,
        model: Denoiser | DenoiserFn,
        *,
        labels: Tensor | None = None,
        clip: bool = False,
        dtype: torch.dtype | None = None,
        _network: bool = False,
    ) -> None:
        if not _network:
            check_model(model)
        self.labels, self.clip = labels, clip
        self.model: Any = model
        #: A Denoiser writes into no levels itself, and sees to its network.
        self._denoiser = isinstance(model, Denoiser)
        self.fused = isinstance(model, Denoiser) and type(model).forward is Denoiser.forward and not _intercepted(model)
        self.fused = self.fused and not unfused(model)
        self.scaling: dict[str, Any] = {"sigma_data": None, "boundary": 0.0}
        self.dtype, self.memory_format = dtype, None
        self._check: Callable[[Tensor | None, int], None] | None = None
        if self.fused and isinstance(model, Denoiser):
            self.model = model.network_output
            self.dtype, self.memory_format = dtype or model.input_dtype, model.input_format
            self._set_scaling(model.preconditioner)
            self._check = model.check_labels

    @classmethod
    def of_network(
        cls,
        network: Callable[..., Tensor],
        preconditioner: Preconditioner,
        *,
        clip: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Evaluator:
        """From a network F(model_input, c_noise) and its preconditioner; clip, dtype as of the class."""
        evaluator = cls(network, clip=clip, dtype=dtype, _network=True)
        evaluator.fused = True
        evaluator._set_scaling(preconditioner)
        return evaluator

    def _set_scaling(self, preconditioner: Preconditioner) -> None:
        self.scaling = {"sigma_data": preconditioner.sigma_data, "boundary": preconditioner.boundary}

    def settle(self, dtype: torch.dtype) -> Evaluator:
        """Take inputs in the dtype of the state where the model does not say otherwise; returns itself.

        Else a step would follow the dtype of the model's output, and round a float32 state for a D in bfloat16.
        """
        self.dtype = self.dtype or dtype
        return self

    def scale_input(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input at (x [B, ...], sigma scalar or [B]), and c_noise [B]."""
        return ops.scale_input(x, sigma, **self.settle(x.dtype).input_options)

    def __call__(self, model_input: Tensor, c_noise: Tensor) -> Tensor:
        """The network's output [B, C, H, W] in its own dtype. Labels are checked at the first call."""
        if self._check is not None:
            self._check(self.labels, model_input.shape[0])
            self._check = None
        labels = () if self.labels is None else (self.labels,)
        output = self.model(model_input, c_noise if self._denoiser else _writable(c_noise), *labels)
        return _output(output, self.model)

    @property
    def input_options(self) -> dict[str, Any]:
        """Keyword arguments of operations that write a network input."""
        scaling = {"sigma_data": self.scaling["sigma_data"], "dtype": self.dtype}
        return scaling if self.memory_format is None else {**scaling, "memory_format": self.memory_format}

    @property
    def step_options(self) -> dict[str, Any]:
        """Keyword arguments of operations that go from a network output to the next input."""
        return {**self.scaling, "clip": self.clip, "dtype": self.dtype}

    def denoised(self, model_output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """D [B, ...] in the dtype of x, from the network's model_output at (x, sigma)."""
        return ops.denoise(model_output, x, sigma, clip=self.clip, **self.scaling)

    def pixels(self, model_output: Tensor, x: Tensor, sigma: Tensor, rounding: str) -> Tensor:
        """D at (x, sigma) as uint8 [B, H, W, C], with a `rounding` of `ops.to_uint8`."""
        return ops.denoise_to_uint8(model_output, x, sigma, rounding=rounding, **self.scaling)


#: What samplers and losses take.
Model = Denoiser | DenoiserFn | Evaluator


def evaluator(model: Model, labels: Tensor | None, clip: bool, *, bounded: bool | None = None) -> Evaluator:
    """The model as samplers and losses see it, with labels int64 [B] or None; clip: D is clamped to [-1, 1], if that is
    where the data lie: as `bounded` says, or else the model.

    One that is an `Evaluator` already keeps its own.
    """
    if isinstance(model, Evaluator):
        return model
    bounded = is_bounded(model) if bounded is None else bounded
    return Evaluator(model, labels=labels, clip=clip and bounded)
