"""Networks with the fast forward pass: the modules, parameters and interface of those they are made of."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.fast.forward import Forward
from cmfast.fast.plan import Plan, Refused, check_parts, methods, of_unet
from cmfast.fast.weights import Weights
from cmfast.native import winograd
from cmfast.ops import _dispatch
from cmfast.unet import UNetModel
from cmfast.watch import Change, Watch, fork_safe, is_plain

#: Held while a plan is made, for which other threads wait. One for all networks, as Dynamo makes no locks.
_looking = fork_safe(1)


class FastPass:
    """What a fast network has beside its modules: the plan of them, and what is made of their weights.

    It knows the network by a twin, an object around the same tables of modules and parameters: knowing it itself, the
    two would keep each other, and their memory, until Python looks for such circles.
    """

    def __init__(
        self, model: nn.Module, make_plan: Callable[[Any], Plan], dtype: torch.dtype | None, pack: bool = True
    ) -> None:
        self._model, self._make_plan, self.dtype, self._pack = _twin(model), make_plan, dtype, pack
        self._weights, self._workspace = Weights(dtype), winograd.Workspace()
        self._plan: Plan | None = None
        self._reason: str | None = None
        self._watch: Watch | None = None
        #: Those that there were then: the watch sees neither what a fast class overrides, nor an attention's processor.
        self._methods: dict[tuple[type, str], object] = {}
        #: Whether there is no plan of the modules as they are.
        self._stale = True
        #: By which it is found while Dynamo traces, where it cannot be looked at.
        self.number = next(_numbers)
        _passes[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: what was made of the modules is made again."""
        return {"model": self._model, "make_plan": self._make_plan, "dtype": self.dtype, "pack": self._pack}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # set up anew

    def plan(self, model: nn.Module, x: Tensor) -> Plan | None:
        """For the fast pass of an input by a network; None if the ordinary pass is to be taken now. A compiled region
        keeps that answer until a part is replaced."""
        # A copy with a table of its own, as of `nn.DataParallel`, may have other parts in it.
        if self._model._modules is not model._modules:
            return None
        # What comes from a mode such as FakeTensorMode has no memory to look at, nor weights that could be kept. Of the
        # meta device, where shapes are asked for, autocast knows nothing.
        if not is_plain(x) or x.is_meta or not _serves(self.number):
            return None
        # Dynamo guards what it sees: of a plan it would be the plan alone, of making one the parts where they are.
        return self._make_plan(self._model) if torch.compiler.is_compiling() else self._plan

    @property
    def refusal(self) -> str | None:
        """Why the network's own pass serves now; None if the fast one does."""
        self._look()
        return self._reason or self._watch.hooked(root=False)  # type: ignore[union-attr]  # _look made it

    def _look(self, force: bool = False) -> bool:
        """Make the plan anew, of the modules as they are, if they changed; whether they did, as far as is seen.

        force: look also where no change shows, and see whether there is still a plan.
        """
        with _looking:
            if self._watch is None:
                self._watch = Watch(self._model)
            elif self._watch.change(values=False) is Change.STRUCTURE or any(
                vars(kind).get(name) is not method for (kind, name), method in self._methods.items()
            ):
                self._stale = True
            if not (self._stale or force):
                return False
            served = self._plan is not None
            self._methods = methods(self._model)
            try:
                check_parts(self._model)
                self._plan, self._reason = self._make_plan(self._model), None
            except Refused as refused:
                self._plan, self._reason = None, str(refused)
            changed = self._stale or served != (self._plan is not None)
            if changed:
                self._weights.clear()
            self._stale = False
            return changed

    def refresh(self, force: bool) -> bool:
        """As `FastUNet.refresh`."""
        return self._look(force) or self._weights.refresh(force)

    @property
    def faster_uncompiled(self) -> bool:
        """As `FastUNet.faster_uncompiled`."""
        self._look()
        if self._plan is None:
            return False
        weight = self._plan.first.weight
        dtype = self.dtype or weight.dtype
        on_cpu = self._pack and weight.device.type == "cpu" and has_onednn(dtype)
        return on_cpu and dtype == winograd.DTYPE and any(map(winograd.wide, self._plan.convolutions()))

    def run(self, plan: Plan, x: Tensor, embed: Callable[[], Tensor]) -> Tensor:
        """The fast pass. x [B, C, H, W], embed() [B, E]."""
        compiling, recording = torch.compiler.is_compiling(), torch.is_grad_enabled()
        live = compiling or (recording and any(p.requires_grad for p in self._model.parameters()))
        dtype, weights = self.dtype or plan.first.weight.dtype, self._weights
        if self.dtype is None and torch.is_autocast_enabled(x.device.type):
            dtype, live = torch.get_autocast_dtype(x.device.type), True
            weights = Weights(dtype)
        waits = _dispatch.use_kernel("group_norm_silu", x, dtypes=(dtype,))
        with torch.autocast(x.device.type, enabled=False):
            emb = embed()
            differentiable = live or (recording and (x.requires_grad or emb.requires_grad))
            # Asked last of oneDNN, which Dynamo does not trace.
            onednn = not (waits or compiling) and x.device.type == "cpu" and has_onednn(dtype)
            packed = onednn and self._pack and not differentiable
            options: dict[str, Any] = {"live": live, "differentiable": differentiable, "packed": packed, "waits": waits}
            options |= {"onednn": onednn, "workspace": self._workspace if onednn else None}
            return Forward(plan, weights, dtype, **options)(x, emb)


_numbers = itertools.count()
_passes: weakref.WeakValueDictionary[int, FastPass] = weakref.WeakValueDictionary()


def _twin(model: nn.Module) -> nn.Module:
    twin: nn.Module = type(model).__new__(type(model))
    twin.__dict__.update({name: value for name, value in vars(model).items() if name != "_fast"})
    return twin


def _serves(number: int) -> bool:
    # oneDNN's convolutions drop tangents, and what a transform wraps has no memory to look at.
    return _dispatch.transform_refusal() is None and _passes[number].refusal is None


# Called, not traced, and its answer taken for a constant: what `torch.compiler.assume_constant_result` does, without
# its import of Dynamo. It takes constants alone, hence the number.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark on a function


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN does a CPU's convolutions in this dtype, and takes weights in its own layout."""
    there = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    if dtype == torch.bfloat16:
        return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return there and dtype == torch.float32


def is_fast(model: object) -> bool:
    """Whether it is of a class that `optimize` makes, whose forward pass is not the one it was written with."""
    return hasattr(type(model), "derives_weights")


class FastUNet(UNetModel):
    """A `UNetModel` with the fast forward pass: `optimize` makes it.

    It holds the modules of the network that it was made of, not copies: state dict, parameters and training mode of the
    parts are shared, and a change of one is seen by the other.
    """

    _fast: FastPass

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """As `UNetModel.forward`."""
        fast = getattr(self, "_fast", None)  # one that its class was called for is without
        plan = None if fast is None else fast.plan(self, x)
        if plan is None:
            return super().forward(x, timesteps, y)
        self._check_inputs(x, timesteps, y)
        return self._fast.run(plan, x, lambda: self.embed(timesteps, y))

    @property
    def input_dtype(self) -> torch.dtype:
        """What it computes in, and so takes its input in."""
        return self._fast.dtype or self.dtype

    def __init_subclass__(cls, **_: Any) -> None:
        """No class of the user's hears of the fast one that is made of it, nor can ask anything of it."""

    #: The layout it computes in; the next input follows that of the output.
    input_format = torch.channels_last

    #: It keeps what is made of weights: whoever captures it calls `refresh` before a replay.
    derives_weights = True

    def refresh(self, force: bool = False) -> bool:
        """Make anew what was made of weights that have changed since; the forward pass does so itself.

        `force`: also where no change shows, after a write through `.data`, as diffusers' `EMAModel` and PEFT make them,
        or to a setting of one of torch's modules, such as `padding_mode`. True if memory was replaced that a captured
        CUDA graph reads, or the ordinary pass serves from now on: then it must be captured again.
        """
        return self._fast.refresh(force)

    @property
    def faster_uncompiled(self) -> bool:
        """Whether a compiler would make it slower: on a CPU its convolutions take less time than inductor's."""
        return self._fast.faster_uncompiled

    @property
    def refusal(self) -> str | None:
        """Why the ordinary forward pass serves, such as a hook on a part; None if the fast one does."""
        return self._fast.refusal


def fast_form(
    model: Any, fast_class: Callable[[Any], Any], make_plan: Callable[[Any], Plan], dtype: torch.dtype | None,
    pack: bool,
) -> Any:  # fmt: skip
    """The fast form of a network, sharing everything with it, of the class that `fast_class` makes of its own."""
    kind: Any = type(model) if is_fast(model) else fast_class(type(model))
    network = kind.__new__(kind)
    network.__dict__.update(model.__dict__)
    network.__dict__["_fast"] = FastPass(network, make_plan, dtype, pack)
    return network


def without_parts(fast_class: Callable[[Any], Any], base: Any) -> Any:
    """A fast network of a class, without its parts: what copies and files begin with."""
    kind = fast_class(base)
    return kind.__new__(kind)


def fast_unet(model: UNetModel, dtype: torch.dtype | None, pack: bool = True) -> FastUNet:
    """The fast form of a U-Net, sharing everything with it."""
    network: FastUNet = fast_form(model, _fast_class, of_unet, dtype, pack)
    return network


@functools.cache
def _fast_class(base: Any) -> Any:
    """The class of a fast network of class `base`: a subclass, with its embedding, its checks and other methods."""
    if base is UNetModel:
        return FastUNet

    class Fast(FastUNet, base):  # type: ignore[misc]  # known at run time
        def __reduce__(self) -> Any:
            # By name pickle would find the base.
            return without_parts, (_fast_class, base), self.__dict__

    Fast.__name__, Fast.__qualname__, Fast.__module__ = base.__name__, base.__qualname__, base.__module__
    return Fast
