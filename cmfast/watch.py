"""What happened to a model since it was last looked at, and the model in evaluation mode for as long as it takes."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module

#: Methods that a class or an object may bring anew, which changes what the model computes.
_METHODS = ("forward", "network_output", "denoise")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MISSING = object()
_training = attrgetter("training")
_version = attrgetter("_version")
_gone = StorageWeakRef.expired


#: Locks that a fork takes, with their ranks.
_fork_safe: list[tuple[int, Any]] = []


def fork_safe(rank: int) -> Any:
    """A lock that no forked process finds taken by a thread that it does not have.

    rank: of locks that a thread holds at once, the one that it takes first has the lowest. A fork takes all of them in
    this order, else it and that thread could wait for each other.
    """
    lock = threading.RLock()
    _fork_safe.append((rank, lock))
    _fork_safe.sort(key=lambda each: each[0])
    return lock


def _take_locks() -> None:
    for _, lock in _fork_safe:
        lock.acquire()


def _leave_locks() -> None:
    for _, lock in reversed(_fork_safe):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take_locks, after_in_parent=_leave_locks, after_in_child=_leave_locks)


class Change(IntEnum):
    """What changed, from least to most. A graph goes on after the first two, and is captured anew after the others."""

    NOTHING = 0
    VALUES = 1  # weights were written in place: the storage is that which a graph reads
    STORAGE = 2  # weights of the same kind lie elsewhere
    STRUCTURE = 3  # modules, dtypes, devices, attributes or methods


class Watch:
    """Sees that a model changed, in a fraction of a millisecond for a thousand modules.

    Seen: parameters and buffers that were written in place, moved, replaced, cast; modules that were replaced, added
    or removed, or given another class; methods that were replaced in an object or a class; attributes of modules that
    are not torch's own; hooks. Not seen: a write through `.data`, which leaves no trace; a setting of a module of
    torch's, such as a convolution's `padding_mode`; what is inside an attribute, such as an item of a list; what is
    inside of a module of torch.jit.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        #: Changes that runs of the model make to its attributes: its own bookkeeping, not settings.
        self._own: set[tuple[nn.Module, str]] = set()
        see_fused_optimizers()
        self._look()

    def _look(self) -> None:
        """Take everything down as it is now: in lists, so that comparing them is one call each."""
        every = list(self.model.modules())
        #: Those with a mode, which what torch.jit has frozen is without.
        self.modules = [module for module in every if hasattr(module, "training")]
        # Their tables of parts are no dicts, and what is in them is made up whenever it is asked for.
        self._scripted = [module for module in every if isinstance(module, torch.jit.ScriptModule)]
        self._looked_at = seen = [module for module in every if not isinstance(module, torch.jit.ScriptModule)]
        objects = [vars(module) for module in seen]
        parts = [vars(module)[name] for module in seen for name in ("_parameters", "_buffers", "_modules")]
        self._objects = objects
        self._empty, self._parts = [part for part in parts if not part], [part for part in parts if part]
        self._part_sizes = list(map(len, self._parts))
        self._members = list(chain.from_iterable(map(dict.values, self._parts)))
        self._hooks = [vars(module)[name] for module in seen for name in _HOOKS]
        # The attributes of torch's own modules are many and seldom written: only a `forward` is looked for.
        self._watched = [(module, vars(module)) for module in seen if not _is_torchs(module)]
        self._live = [attributes for _, attributes in self._watched]
        self._look_at_attributes()
        present = set(seen)
        self._own = {(module, name) for module, name in self._own if module in present}
        classes = sorted(set(map(type, seen)), key=id)
        self._methods = [(cls, name) for cls in classes for name in _METHODS if hasattr(cls, name)]
        self._bodies = [getattr(cls, name) for cls, name in self._methods]
        self._classes = list(map(type, seen))
        self._forwards = [attributes.get("forward") for attributes in objects]
        self._look_at_tensors()

    def _look_at_attributes(self) -> None:
        self._sizes = list(map(len, self._live))
        self._saved = [dict(attributes) for attributes in self._live]
        self._values = list(chain.from_iterable(map(dict.values, self._live)))

    def _look_at_tensors(self) -> None:
        tensors = [member for member in self._members if isinstance(member, Tensor)]
        # Others may have no storage of their own to look at.
        plain = [is_plain(x) and x.layout is torch.strided for x in tensors]
        self._tensors = list(compress(tensors, plain))
        self._kinds = [_kind(x) for x in self._tensors]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._storages = list(map(storage_of, self._tensors))
        # Tensors made in inference mode count no versions.
        self._counted = not any(map(Tensor.is_inference, self._tensors))
        self._versions = list(map(_version, self._tensors)) if self._counted else []
        devices = sorted({str(x.device) for x in tensors})
        special = sorted(
            str(x.layout) if is_plain(x) else type(x).__name__ for x, is_one in zip(tensors, plain) if not is_one
        )
        #: Why changes of this model could not be seen; None if they can.
        self.unseen: str | None = None
        if self._scripted:
            self.unseen = f"{self.name(self._scripted[0])} is of torch.jit, inside of which no change is seen"
        elif special:
            self.unseen = f"a {special[0]} among the weights is not a plain tensor"
        elif len(devices) > 1:
            self.unseen = f"the model lies on several devices: {', '.join(devices)}"

    def change(self, *, values: bool = True) -> Change:
        """What changed since the last call, or since this object was made.

        values: look for writes in place as well, which not everyone needs to know of.
        """
        if self._structure_changed():
            self._look()
            return Change.STRUCTURE
        if list(map(Tensor.data_ptr, self._tensors)) != self._pointers or any(map(_gone, self._storages)):
            cast = [_kind(x) for x in self._tensors] != self._kinds
            self._look_at_tensors()
            return Change.STRUCTURE if cast else Change.STORAGE
        if values:
            if not self._counted:
                return Change.VALUES
            versions = list(map(_version, self._tensors))
            if versions != self._versions:
                self._versions = versions
                return Change.VALUES
        return Change.NOTHING

    def _structure_changed(self) -> bool:
        if any(self._empty) or list(map(len, self._parts)) != self._part_sizes:
            return True
        if not all(map(is_, chain.from_iterable(map(dict.values, self._parts)), self._members)):
            return True
        if not all(getattr(cls, name) is body for (cls, name), body in zip(self._methods, self._bodies)):
            return True
        if not all(map(is_, map(type, self._looked_at), self._classes)):
            return True
        if not all(map(is_, [attributes.get("forward") for attributes in self._objects], self._forwards)):
            return True
        if list(map(len, self._live)) == self._sizes and all(
            map(is_, chain.from_iterable(map(dict.values, self._live)), self._values)
        ):
            return False
        return bool(self._attribute_changes() - self._own)

    def _attribute_changes(self) -> set[tuple[nn.Module, str]]:
        return {
            (module, name)
            for (module, now), then in zip(self._watched, self._saved)
            for name in (now.keys() | then.keys()) - {"training"}
            if not _same(now.get(name, _MISSING), then.get(name, _MISSING))
        }

    def settle(self, *, anew: bool = False) -> None:
        """Call it after a run: attributes that the run itself wrote count as the model's own from now on. anew: before
        one; those that earlier runs wrote count no more."""
        self._own = set() if anew else self._own | self._attribute_changes()
        self._look_at_attributes()

    def hooked(self, *, root: bool = True) -> str | None:
        """Which module has a hook, if any has: such a model must be called as it is. `root`: look at the model itself,
        and not at its parts alone."""
        if any(getattr(torch_module, f"_global{kind}") for kind in _HOOKS):
            return "a hook is registered for all modules"
        skipped = 0 if root else len(_HOOKS)
        if not any(self._hooks[skipped:]):
            return None
        number = next(i for i, hooks in enumerate(self._hooks) if hooks and i >= skipped) // len(_HOOKS)
        return f"{self.name(self._looked_at[number])} has a hook"

    def name(self, module: nn.Module) -> str:
        """What to call a module in a message."""
        return name_of(self.model, module)


@functools.cache
def see_fused_optimizers() -> None:
    """Count what torch's fused optimizers write: their kernels leave the versions of parameters as they were."""
    from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

    def count(optimizer: Optimizer, arguments: object, options: object) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(count)


def name_of(model: nn.Module, module: nn.Module) -> str:
    """`network.conv1 (Conv2d)`, or `the model (Denoiser)`."""
    name = next((name for name, other in model.named_modules() if other is module), "")
    return f"{name or 'the model'} ({type(module).__name__})"


def called_plainly(module: nn.Module) -> bool:
    """Whether a call of a module runs its class's `forward`, and nothing else."""
    own = vars(module)
    replaced = "forward" in own or own.get("_compiled_call_impl") is not None
    hooked = any(own[kind] or getattr(torch_module, f"_global{kind}") for kind in _HOOKS)
    return not (replaced or hooked)


def storage_of(x: Tensor) -> StorageWeakRef:
    """Says when the memory that x has now was given up: new memory may have its address, after a second swap of
    `.data` even mostly has. It keeps nothing alive."""
    return StorageWeakRef(x.untyped_storage())


def is_plain(x: Tensor) -> bool:
    """Whether it is a tensor of torch's own kinds, and no subclass with rules of its own."""
    return type(x) in (Tensor, nn.Parameter, nn.Buffer)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.device, x.shape, x.stride()


def _same(now: object, then: object) -> bool:
    """The same object, or an equal number or name: other things may be equal and still not the same memory."""
    if now is then:
        return True
    return type(now) is type(then) and isinstance(now, (bool, int, float, str, tuple)) and now == then


#: Modules in training mode that are held in evaluation mode, and how many hold them.
_held: dict[nn.Module, int] = {}
_held_lock = fork_safe(2)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """These modules in evaluation mode, and each back in its own mode after the last of all threads that want this."""
    mine: list[nn.Module] = []
    with _held_lock:
        # The first case is the common one, in which there is nothing to do, nor to undo.
        modules = modules if isinstance(modules, list) else list(modules)
        if _held or any(map(_training, modules)):
            mine = [module for module in modules if module in _held or module.training]
        for module in mine:
            _held[module] = _held.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _held_lock:
            for module in mine:
                _held[module] -= 1
                if not _held[module]:
                    module.training = True
                    del _held[module]
