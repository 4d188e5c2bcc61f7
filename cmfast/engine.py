"""The sampling engine: images from (seed, index) alone, in batches of one size, from noise to pixels in one graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from cmfast import ops, schedules
from cmfast.denoiser import (
    Denoiser,
    DenoiserFn,
    Evaluator,
    check_model,
    is_bounded,
    noise_range,
    stated,
    stated_classes,
    unfused,
)
from cmfast.graphs import Values
from cmfast.levels import Sigmas
from cmfast.memory import largest_that_fits, out_of_memory
from cmfast.networks import COMPILE
from cmfast.noise import CounterNoise, GivenNoise, NoiseFn, counter_labels
from cmfast.ops import _check
from cmfast.runner import Runner
from cmfast.samplers import check_options, check_pixels, sample, sampler_sigmas
from cmfast.transfer import HostCopies

Classes = int | Sequence[int] | Tensor | None
#: The samplers that draw noise between their steps.
DRAWING = ("multistep", "onestep", "heun", "dpm", "ancestral")


class Sampler:
    """Makes images with a model; sample i of a seed is the same whatever else is made with it.

    On a GPU the loop is captured once for each shape and replayed. Before each batch the model is looked at: weights
    written in place are used as they are; replaced weights, modules or methods make it capture again; a model with
    hooks is called as it is, without a graph. Only a write through `.data`, or to a setting of one of torch's own
    layers such as `padding_mode`, needs a call of `refresh()`.
    The model is in evaluation mode for as long as a batch is started, and then in its own again.
    Threads may share it. Copied, pickled or sent to another process it is a sampler of its own; in a forked process it
    goes on where PyTorch can, and says so where not.

    Args:
        model: a `Denoiser`, or any D(x, sigma[, labels]); one with labels says by an attribute `num_classes` how many
            classes it has.
        batch_size: images per network call. The last batch is filled up to it, and the surplus dropped.
        steps, sigmas, ts, num_scales: one of the first three says which noise levels, as in
            `cmfast.samplers.sampler_sigmas`; by default one step, 18 for ODE solvers.
        sampler: `multistep`, `onestep`, `heun`, `euler`, `dpm`, `ancestral` or `progdist`.
        image_shape: (C, H, W), or (C, ...) of a signal or a video; needed where the model does not know it.
        compile: True or `whole`: `torch.compile` for the network, but for one whose own convolutions on a CPU are
            faster; `regional`: for its blocks; False, `auto`: no.
        cuda_graph: `auto`: on a GPU where nothing speaks against it; True: or an error; False: no.
        dtype: what an optimised network computes in (default: as the model).
        noise: `counter`: it follows from (seed, index); or a generator on the model's device, drawn from in turn.
        optimize: `auto`: the network in fewer passes over memory where `cmfast.optimize` takes it; True: or an error.
        cache_size: how many shapes are kept ready; what was not used for longest goes.
        bounded: whether what the model makes lies in [-1, 1] (default: what it says, else True). False, of latents,
            say: nothing is clamped, and there are no pixels.
        pixels: what `sample` and `stream` give: `trunc` or `nearest`: uint8 [n, H, W, C] with that rounding; None:
            float32 [n, C, H, W]; `auto`: `trunc`, but None for data without a range, or of another shape than images.
        options: the sampler's own, such as `clip_denoised` or `s_churn`; a `noise_fn` draws what is added in between.

    Raises: ValueError: an unknown sampler, contradicting levels, a batch below 1, no image shape, or pixels of data
        without a range. TypeError: an option that the sampler does not have. RuntimeError: what was asked for with
        True cannot be had, and why.

    >>> sampler = Sampler(lambda x, sigma: 0.1 * x, batch_size=2, image_shape=(1, 8, 8))
    >>> images = sampler.sample(3, seed=0)
    >>> images.shape, images.dtype
    (torch.Size([3, 8, 8, 1]), torch.uint8)
    """

    def __init__(
        self,
        model: Denoiser | DenoiserFn,
        batch_size: int = 64,
        *,
        steps: int | None = None,
        sigmas: Sigmas | None = None,
        ts: Sequence[int] | None = None,
        num_scales: int = 40,
        sampler: str = "multistep",
        image_shape: tuple[int, ...] | None = None,
        compile: str | bool = "auto",
        cuda_graph: str | bool = "auto",
        dtype: torch.dtype | None = None,
        noise: str | torch.Generator = "counter",
        optimize: str | bool = "auto",
        cache_size: int = 8,
        bounded: bool | None = None,
        pixels: str | None = "auto",
        **options: Any,
    ) -> None:
        batch_size = _check.whole("batch_size", batch_size, least=1)
        cache_size = _check.whole("cache_size", cache_size, least=1)
        if noise != "counter" and not isinstance(noise, torch.Generator):
            raise ValueError(f"noise must be 'counter' or a torch.Generator, got {noise!r}")
        for name, value in {"cuda_graph": cuda_graph, "optimize": optimize}.items():
            if value not in ("auto", True, False):
                raise ValueError(f"{name} must be 'auto', True or False, got {value!r}")
        if compile not in (*COMPILE, True, False):
            raise ValueError(f"compile must be True, False, {', '.join(map(repr, COMPILE))}, got {compile!r}")
        check_model(model)
        shape = stated(model, "image_shape") if image_shape is None else image_shape
        if shape is None:
            raise ValueError("image_shape=(C, H, W) is needed: the model does not say what it makes")
        self._model, self.batch_size, self.sampler, self.options = model, batch_size, sampler, options
        self.image_shape, self.num_scales, self.noise = _image_shape(shape), num_scales, noise
        self.num_classes = stated_classes(model)
        self.bounded = is_bounded(model) if bounded is None else _check.flag("bounded", bounded)
        made = "trunc" if self.bounded and len(self.image_shape) == 3 else None
        self.pixels = made if pixels == "auto" else pixels
        if self.pixels is not None:
            check_pixels(self.pixels, self.bounded)
        self._range: dict[str, Any] = noise_range(model)
        self.sigmas = sampler_sigmas(sampler, steps=steps, sigmas=sigmas, ts=ts, num_scales=num_scales, **self._range)
        check_options(sampler, options)
        self._runner = Runner(
            model,
            cuda_graph=cuda_graph,
            cache_size=cache_size,
            host_work=self._host_work(),
            optimize=optimize,
            compile=compile if isinstance(compile, str) else "whole" if compile else "off",
            dtype=dtype,
        )
        if isinstance(noise, torch.Generator) and noise.device.type != self.device.type:
            raise ValueError(f"noise is a generator on {noise.device} and the model is on {self.device}")

    @property
    def model(self) -> Any:
        """What it samples from; for another make a new `Sampler`."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where the model is now; the CPU if it has no weights."""
        return self._runner.device

    @property
    def ts(self) -> tuple[int, ...]:
        """The levels as indices of the grid of `num_scales`, the nearest ones; the last is where sampling ends."""
        return schedules.nearest_ts([sigma for sigma in self.sigmas if sigma > 0], self.num_scales, **self._range)

    @property
    def startup(self) -> float:
        """Seconds spent so far to get ready: optimising, compiling with the first run, warming up and capturing."""
        return self._runner.startup

    def explain(self) -> dict[str, tuple[str, str]]:
        """What runs, and why not something faster: `loop`, `network` and `compile`, each as (path, why).

        >>> Sampler(lambda x, sigma: 0.1 * x, image_shape=(1, 8, 8)).explain()["loop"]
        ('eager', 'the model is on a cpu device: CUDA graphs are for GPUs')
        """
        said = self._runner.explain(self._host_work())
        reason = unfused(self.model)
        if reason is not None:
            path, why = said["network"]
            said["network"] = path, f"{why}; {reason}"
        return said

    def refresh(self) -> None:
        """Take the model as it is now, after a write through `.data` or to a setting of torch's own layers, which
        nothing else shows."""
        self._runner.refresh()

    def sample(self, n: int, *, seed: int = 0, classes: Classes = None, progress: bool = False) -> Tensor:
        """n images, uint8 [n, H, W, C] on the CPU; float32 [n, C, H, W] of a sampler without pixels.

        Args: seed: noise, and labels if not given, follow from it and the sample's index alone;
            classes: one for all, or n of them; progress: show a bar.
        Raises: ValueError: n below 0, or classes that do not fit. torch.OutOfMemoryError: a batch does not fit; the
            message names the largest that does.
        """
        batches = [images for images, _ in self.stream(n, seed=seed, classes=classes, progress=progress)]
        return torch.cat(batches) if batches else self.empty(0)

    def empty(self, n: int) -> Tensor:
        """Memory for n of what `sample` gives, on the CPU."""
        channels, *sizes = self.image_shape
        if self.pixels is None:
            return torch.empty(n, channels, *sizes, dtype=torch.float32, device="cpu")
        return torch.empty(n, *sizes, channels, dtype=torch.uint8, device="cpu")

    def stream(
        self, n: int, *, seed: int = 0, classes: Classes = None, progress: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of (images, labels [b] or None) on the CPU; n images in all. Images and arguments as of `sample`.

        On a GPU a batch is handed out when the next one has been started, with the weights of that moment.
        """
        labels = self.labels(n, seed=seed, classes=classes)
        return self.batches(range(0, n, self.batch_size), n, labels, seed=seed, progress=progress)

    def batches(
        self, starts: Sequence[int], n: int, labels: Tensor | None, *, seed: int = 0, progress: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of the batches of `stream` those that begin at `starts`. labels: int64 [n], as `Sampler.labels` gives; seed
        and progress as of `sample`."""
        self._runner.check_process()
        device, size = self.device, self.batch_size
        seed = seed if isinstance(seed, Tensor) else _check.integer("seed", seed, device)
        padded = None
        if labels is not None and n:
            # The surplus of the last batch repeats the last label: nothing of it is kept.
            padded = torch.cat([labels, labels[-1:].expand(-n % size)]).to(device)
        copies = HostCopies(device)
        started: list[int] = []

        def arrived() -> tuple[Tensor, Tensor | None]:
            start = started.pop(0)
            end = min(start + size, n)
            return copies.receive()[: end - start], None if labels is None else labels[start:end]

        for start in _bar(starts) if progress else starts:
            batch_labels = None if padded is None else padded[start : start + size]
            self._make(range(start, start + size), seed, batch_labels, copies.send)
            started.append(start)
            if len(copies) > copies.ahead:
                yield arrived()
        while started:
            yield arrived()

    def labels(self, n: int, *, seed: int = 0, classes: Classes = None) -> Tensor | None:
        """The labels int64 [n] that `sample` uses: those given, or drawn from (seed, index); None if unconditional.

        Raises: ValueError: n below 0; classes for an unconditional model, not n of them, or out of range.
        """
        n = _check.whole("n", n, least=0)
        if self.num_classes is None:
            if classes is not None:
                raise ValueError(
                    "classes were given to an unconditional model: leave them out; "
                    "a function D(x, sigma, labels) says by an attribute num_classes how many it has"
                )
            return None
        if classes is None:
            return counter_labels(seed, torch.arange(n, device="cpu"), self.num_classes)
        try:
            labels = torch.as_tensor(classes, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # no numbers, or one of more than 64 bits
            raise ValueError(f"classes must be whole numbers, got {shorten(repr(classes), 100)}") from None
        if labels.numel() and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
            raise ValueError(f"classes must be whole numbers, got {labels.dtype}")
        labels = labels.to(torch.int64)
        labels = labels.expand(n) if labels.ndim == 0 else labels
        if labels.shape != (n,):
            raise ValueError(f"classes must be one class or {n} of them, got {list(labels.shape)}")
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            came = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"classes must be from 0 to {self.num_classes - 1}, got {came}")
        # Not the caller's memory, which may be written to while a stream goes on.
        return labels.clone()

    def generate(
        self,
        noise: Tensor | ops.Draw,
        labels: Tensor | None = None,
        *,
        noise_fn: NoiseFn | Sequence[Tensor] | None = None,
        pixels: str | None = None,
    ) -> Tensor:
        """Images in [-1, 1], [B, C, H, W], from unit noise of that shape or a draw; data as they are, if not bounded.

        labels: int64 [B], of a class-conditional model.
        noise_fn: draws what steps add (default: torch's own generator), or holds it, a tensor for each draw. From
            tensors alone it runs as a graph; a function or a draw is called for at each step.
        pixels: make uint8 [B, H, W, C] instead, with this rounding.
        """
        if not isinstance(noise, ops.Draw):
            _check.float_tensor("noise", noise)
        draws = noise_fn if noise_fn is None or callable(noise_fn) else list(noise_fn)
        values: Values = {} if isinstance(noise, ops.Draw) else {"noise": noise}
        if labels is not None:
            values["labels"] = labels
        if isinstance(draws, list):
            values.update({f"draw {i}": draw for i, draw in enumerate(draws)})

        def loop(model: Any, values: dict[str, Any]) -> Tensor:
            first, labels = values.get("noise", noise), values.get("labels")
            if not isinstance(draws, list):
                return self._loop(model, first, labels, draws, pixels)
            given = GivenNoise([values[f"draw {i}"] for i in range(len(draws))])
            made = self._loop(model, first, labels, given, pixels)
            given.check_used()
            return made

        called = callable(draws) or isinstance(noise, ops.Draw)
        generators = [_default_generator(noise.device)] if draws is None and isinstance(noise, Tensor) else []
        return self._runner.run(
            ("generate", draws is None, pixels, self._settings()),
            loop,
            values,
            Tensor.clone,
            generators=generators,
            host_work="noise is drawn by a function" if called else self._host_work(),
        )

    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """D(x, sigma) in the dtype of x, not clipped: one network call. x [B, C, H, W]; sigma scalar or [B]; labels
        int64 [B].

        >>> sampler = Sampler(lambda x, sigma: 0.5 * x, image_shape=(1, 2, 2))
        >>> sampler.denoise(torch.ones(1, 1, 2, 2), 1.0).unique()
        tensor([0.5000])
        """
        _check.float_tensor("x", x)
        number = not isinstance(sigma, Tensor)
        if number:
            _check.real("sigma", sigma)
        values: Values = {"x": x, "sigma": float(sigma) if number else sigma}
        if labels is not None:
            values["labels"] = labels

        def loop(model: Any, values: dict[str, Any]) -> Tensor:
            x, level = values["x"], values["sigma"]
            if number:
                wide = _check.sigma_dtype(x)
                # In a graph it is a tensor already.
                level = level.to(wide) if isinstance(level, Tensor) else x.new_full((), level, dtype=wide)
            evaluate = Evaluator(model, labels=values.get("labels")).settle(x.dtype)
            return evaluate.denoised(evaluate(*evaluate.scale_input(x, level)), x, level)

        return self._runner.run("denoise", loop, values, Tensor.clone)

    def _loop(
        self, model: Any, noise: Tensor | ops.Draw, labels: Tensor | None, noise_fn: NoiseFn | None, pixels: str | None
    ) -> Tensor:
        """The sampler's algorithm, from noise to images or pixels."""
        options = {"image_shape": self.image_shape, "bounded": self.bounded, "pixels": pixels, **self.options}
        if noise_fn is not None and self.sampler in DRAWING:
            options["noise_fn"] = noise_fn
        return sample(model, noise, sampler=self.sampler, sigmas=self.sigmas, labels=labels, **options)

    def _make(self, index: range, seed: int, labels: Tensor | None, take: Callable[[Tensor], object]) -> None:
        """Make samples `index` as `sample` gives them, [B, ...], and give them to `take`."""
        # A batch that fails has drawn nothing: whoever tries again gets its images.
        state = self.noise.get_state() if isinstance(self.noise, torch.Generator) else None
        try:
            self._run_batch(index, seed, labels, take)
            return
        except BaseException as error:
            self._put_back(state)
            if not out_of_memory(error):
                raise
            # Without its frames, which hold the tensors of the batch that was too large.
            failure = error.with_traceback(None)

        def run(size: int) -> None:
            self._runner.forget()
            part = None if labels is None else labels[:size]
            self._run_batch(range(size), seed, part, lambda images: images.sum().item())

        fits = largest_that_fits(run, len(index))
        self._put_back(state)
        self._runner.forget()
        found = f"the largest that does is {fits}" if fits else "and not one image does"
        raise torch.OutOfMemoryError(
            f"batch_size={len(index)} does not fit into the memory of {self.device}: {found}"
        ) from failure

    def _put_back(self, state: Tensor | None) -> None:
        if isinstance(self.noise, torch.Generator) and state is not None:
            self.noise.set_state(state)

    def _run_batch(self, index: range, seed: int, labels: Tensor | None, take: Callable[[Tensor], object]) -> None:
        generator = self.noise if isinstance(self.noise, torch.Generator) else None
        own: NoiseFn | None = self.options.get("noise_fn")
        values: Values = {"index": index, "seed": seed}
        if labels is not None:
            values["labels"] = labels

        def loop(model: Any, values: dict[str, Any]) -> Tensor:
            if generator is None:
                counter = CounterNoise(values["seed"], values["index"])
                return self._loop(model, counter.next(), values.get("labels"), own or counter, self.pixels)
            drawn = _drawn_by(generator)
            like = torch.empty(len(index), *self.image_shape, dtype=torch.float32, device=values["index"].device)
            noise = drawn(like)
            return self._loop(model, noise, values.get("labels"), own or drawn, self.pixels)

        generators = [] if generator is None else [generator]
        key = "sample", self._settings()
        self._runner.run(key, loop, values, take, generators=generators, host_work=self._host_work())

    def _host_work(self) -> str | None:
        """Why the loop needs the host between its steps, with the options as they are now; None if it does not."""
        return next((f"{name} is called between steps" for name in _CALLED if self.options.get(name)), None)

    def _settings(self) -> Hashable:
        """What a graph holds of this sampler's own, which may be changed between two calls."""
        plain = (bool, int, float, str)
        options = ((name, v if isinstance(v, plain) else id(v)) for name, v in self.options.items())
        return self.sampler, tuple(self.sigmas), self.image_shape, self.bounded, self.pixels, *options


#: Options of samplers that are called on the host between two steps.
_CALLED = ("callback", "noise_fn", "progress")


def _image_shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Iterable) else ()
    if not sizes:
        raise ValueError(f"image_shape must be (C, H, W), or (C, ...) of data that are no images, got {shape!r}")
    return tuple(_check.whole("image_shape", size, least=1) for size in sizes)


def _drawn_by(generator: torch.Generator) -> NoiseFn:
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _default_generator(device: torch.device) -> torch.Generator:
    """The one that torch draws from on a device where none is named."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _bar(starts: Sequence[int]) -> Iterable[int]:
    from tqdm.auto import tqdm

    return tqdm(starts, unit="batch")
