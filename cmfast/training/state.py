"""The state of a run, from a step to files and back: all that an interrupted run needs to go on to the same bits."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from cmfast import checkpoint
from cmfast.denoiser import Denoiser
from cmfast.ema import whole
from cmfast.memory import out_of_memory
from cmfast.ranks import RankError, Ranks
from cmfast.training.parallel import distributed_like, with_network
from cmfast.training.step import TrainStep
from cmfast.unet import UNetModel

#: The name of a file, and what writes it to a path.
Part = tuple[str, Callable[[Path], None]]

STATE, MODEL, TEACHER = "state.pt", "model.safetensors", "teacher.safetensors"


def fingerprint(model: nn.Module | None) -> str | None:
    """What the weights of a model are, told from 64 values of each tensor; None of no model."""
    if model is None:
        return None
    digest = hashlib.sha256()
    for name, x in _plain(model.state_dict()).items():
        some = x.detach().flatten()[:: max(x.numel() // 64, 1)]
        digest.update(repr((name, tuple(x.shape), some.tolist())).encode())
    return digest.hexdigest()[:16]


class State:
    """Writes and reads the state of a `TrainStep`.

    model: the student before it was shared out between processes, of which a copy is kept on the CPU: what is written
    is put together in it, one set of weights after the other.

    Raises: ValueError: the network keeps more than tensors.
    """

    def __init__(self, model: Denoiser, group: Ranks) -> None:
        self.group = group
        self._shadow = copy.deepcopy(model).to("cpu").eval()
        for name, value in self._shadow.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name} of the network's state is a {type(value).__name__}, and the files of a run hold tensors "
                    "alone: leave out get_extra_state, or make a buffer of it"
                )

    def names(self, step: TrainStep) -> list[str]:
        """The files of the averages."""
        return [f"average-{str(rate).replace(':', '-')}.safetensors" for rate in step.averages.schedules]

    def average(self, step: TrainStep, k: int) -> Denoiser:
        """The student with average k for weights, on the CPU. For all processes to call; the next call changes it."""
        step.averages.copy_to(self._shadow, k)
        return self._shadow

    def parts(self, step: TrainStep, done: int, settings: Mapping[str, Any]) -> Iterator[Part]:
        """The files of a checkpoint; each is to be written before the next is asked for.

        For all processes to go through to the end, whether they write or not, or could not: between one and the next,
        what is shared out is put together.
        """
        for k, name in enumerate(self.names(step)):
            yield name, partial(save_weights, self.average(step, k), consistency=step.objective.consistency)
        teacher = step.teacher_model if step.objective.teacher_follows else None
        for each, name in ((step.model, MODEL), (teacher, TEACHER)):
            if each is not None:
                self._copy(each)
                yield name, partial(save_weights, self._shadow, consistency=step.objective.consistency)
        state = {
            "step": done,
            "settings": dict(settings),
            "optimizer": _mapped(whole, step.optimizer.state_dict()),
            "averages": {k: v for k, v in step.averages.state_dict().items() if k != "averages"},
            "scaler": None if step.scaler is None else step.scaler.state_dict(),
            "skipped": int(step.optimizer.skipped),
            "random": self._generators(step.device),
        }

        def write(path: Path) -> None:
            try:
                torch.save(state, path)
            except RuntimeError as error:  # PyTorch's writer, where the disk is full
                raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error

        yield STATE, write

    def read(self, step: TrainStep, folder: Path) -> int:
        """Put a step into the state of a folder; how many steps were done. Raises: CheckpointError: it is damaged."""
        try:
            with self.group.connected():
                return self._read(step, folder)
        except Exception as error:
            # Of the last three a folder is no cause: it is not to be taken away for them.
            if isinstance(error, (checkpoint.CheckpointError, RankError, PermissionError)) or out_of_memory(error):
                raise
            raise checkpoint.CheckpointError(_damaged(folder, error)) from error

    def _read(self, step: TrainStep, folder: Path) -> int:
        # On a CPU the optimizer goes on with these tensors, which are not to be parts of a file that is removed.
        state = read(folder, mmap=step.device.type != "cpu")
        _load(step.model, folder / MODEL)
        if step.objective.teacher_follows:
            _load(step.teacher_model, folder / TEACHER)  # type: ignore[arg-type]  # a teacher that follows is there
        parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
        for i, values in state["optimizer"]["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameters[i].shape:
                    raise ValueError(f"{name} of parameter {i} is {list(value.shape)}, not {list(parameters[i].shape)}")
            state["optimizer"]["state"][i] = {k: distributed_like(v, parameters[i]) for k, v in values.items()}
        step.optimizer.load_state_dict(state["optimizer"])
        averages = []
        for k, name in enumerate(self.names(step)):
            tensors = {f"network.{key}": value for key, value in _plain(load_file(folder / name)).items()}
            like = dict(zip(step.averages.names, step.averages.tensors(k)))
            _check(tensors, like, folder / name)
            averages.append({key: distributed_like(tensors[key], value) for key, value in like.items()})
        step.averages.load_state_dict({**state["averages"], "averages": averages})
        if step.scaler is not None:
            step.scaler.load_state_dict(state["scaler"])
        step.optimizer.skipped.fill_(state.get("skipped", 0))  # which older checkpoints do not have
        if state["step"]:
            step.stage = step.objective.stage(state["step"] - 1)
        self._restore(state["random"], step.device)
        return int(state["step"])

    def check(self, step: TrainStep) -> None:
        """After a step: ValueError where the network made tensors in it, which nothing trains, averages or saves."""
        ours, theirs = (_plain(cast(Any, model.network).state_dict()) for model in (self._shadow, step.model))
        changed = [name for name in {**ours, **theirs} if _shape(ours.get(name)) != _shape(theirs.get(name))]
        if changed:
            names = ", ".join(changed[:3]) + " and others" * (len(changed) > 3)
            raise ValueError(
                f"the network has made or changed {names} in its first step, too late to be trained, averaged and "
                "saved: call it once before it is trained, or make all of it in __init__"
            )

    def _copy(self, model: Denoiser) -> None:
        ours, theirs = (_plain(each.state_dict()) for each in (self._shadow, model))
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(whole(theirs[name]))

    def _generators(self, device: torch.device) -> list[Any]:
        """The states of torch's generators on every rank."""
        mine = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(device)
        if self.group.size == 1:
            return [mine]
        states: list[Any] = [None] * self.group.size
        dist.all_gather_object(states, mine, self.group.messages)
        return states

    def _restore(self, states: list[Any], device: torch.device) -> None:
        """With another number of ranks they start anew: what follows from counters stays the same."""
        if len(states) != self.group.size:
            return
        mine = states[self.group.rank]
        torch.set_rng_state(mine["cpu"])
        if device.type == "cuda" and "cuda" in mine:
            torch.cuda.set_rng_state(mine["cuda"], device)


def read(folder: Path, *, mmap: bool = True) -> dict[str, Any]:
    """What `state.pt` of a checkpoint holds; mmap: tensors stay in the file. Raises: CheckpointError: it is not there,
    damaged, or the state of another step."""
    try:
        options = {} if mmap else {"mmap": False}
        state: dict[str, Any] = checkpoint.read_pickle(folder / STATE, map_location="cpu", **options)
    except (checkpoint.CheckpointError, FileNotFoundError) as error:
        raise checkpoint.CheckpointError(_damaged(folder, error)) from error
    kinds = {"step": int, "settings": dict, "optimizer": dict, "averages": dict, "random": list}
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise checkpoint.CheckpointError(_damaged(folder, f"{STATE} has no {name}"))
    if not isinstance(state["settings"].get("options"), dict):
        raise checkpoint.CheckpointError(_damaged(folder, f"{STATE} has no options"))
    if folder.name != f"step-{state['step']:08d}":
        raise checkpoint.CheckpointError(_damaged(folder, f"{STATE} is of step {state['step']}"))
    return state


def _damaged(folder: Path, error: Exception | str) -> str:
    reason = repr(error) if isinstance(error, LookupError) else str(error) or type(error).__name__
    return (
        f"{folder} is damaged: {reason.splitlines()[0][:200]}. Take this folder away, and the run goes on from the "
        "checkpoint before it"
    )


def save_weights(model: Denoiser, path: Path, *, consistency: bool = False) -> None:
    """A file that `cmfast.load` reads, where the network is a `UNetModel`; else its tensors alone. consistency: as of
    `cmfast.save`."""
    network: Any = model.network
    network = getattr(network, "_orig_mod", network)
    if isinstance(network, UNetModel):
        checkpoint.save(with_network(model, network), path, consistency=consistency)
        return
    checkpoint.write_tensors(_plain(network.state_dict()), path)


def _load(model: Denoiser, path: Path) -> None:
    tensors, ours = _plain(load_file(path)), _plain(cast(Any, model.network).state_dict())
    _check(tensors, ours, path)
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(distributed_like(tensors[name], tensor))


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names without what torch.compile puts into them: a network may be compiled or not."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}


def _check(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], path: Path) -> None:
    """Raises: ValueError: tensors that a copy would make fit, though they are others."""
    for name, tensor in like.items():
        if name not in tensors:
            raise ValueError(f"there is no {name} in {path.name}")
        got = tensors[name]
        if got.shape != tensor.shape or got.is_floating_point() != tensor.is_floating_point():
            found, wanted = (f"{x.dtype} {list(x.shape)}" for x in (got, tensor))
            raise ValueError(f"{name} in {path.name} is {found}, expected {wanted}")


def _mapped(function: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(function, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, each) for each in value)
    return value
