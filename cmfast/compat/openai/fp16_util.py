"""`cm.fp16_util`: training a network whose torso is float16, through float32 master parameters.

In float16, master parameters are two flat tensors: one of all scalars and vectors [n], one of all matrices [1, n].
In float32 they are the parameters themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.compat.openai import logger

#: log2 of the loss scale at the start.
INITIAL_LOG_LOSS_SCALE = 20.0

#: Where gradients are not finite at so small a loss scale, it is not the scale.
_LEAST_LOG_LOSS_SCALE = -24.0

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: ([(name, parameter), ...], shape of their master parameter)
Group = tuple[list[tuple[str, Tensor]], Any]


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741
    """Cast a convolution to float16, in place; other modules stay as they are. For `module.apply`."""
    if isinstance(l, _CONVS):
        l.half()


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Cast a convolution to float32, in place; other modules stay as they are. For `module.apply`."""
    if isinstance(l, _CONVS):
        l.float()


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, Tensor]]) -> list[Group]:
    """Scalars and vectors, of which the master parameter is [n]; and matrices, of which it is [1, n]."""
    named = list(named_model_params)
    return [
        ([(name, parameter) for name, parameter in named if parameter.ndim <= 1], (-1)),
        ([(name, parameter) for name, parameter in named if parameter.ndim > 1], (1, -1)),
    ]


def make_master_params(param_groups_and_shapes: Iterable[Group]) -> list[nn.Parameter]:
    """A float32 copy of each group, flat."""
    return [
        nn.Parameter(torch.cat([parameter.detach().float().flatten() for _, parameter in group]).view(shape))
        for group, shape in param_groups_and_shapes
    ]


@torch.no_grad()
def model_grads_to_master_grads(param_groups_and_shapes: Iterable[Group], master_params: Iterable[Tensor]) -> None:
    """Give master parameters the gradients of their groups, in their dtype; zeros where there is none."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = torch.empty_like(master)
        torch._foreach_copy_(
            list(unflatten_master_params(group, master.grad.view(-1))),
            [param_grad_or_zeros(parameter) for _, parameter in group],
        )


@torch.no_grad()
def master_params_to_model_params(param_groups_and_shapes: Iterable[Group], master_params: Iterable[Tensor]) -> None:
    """Copy master parameters to the parameters of their groups."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        torch._foreach_copy_(
            [parameter for _, parameter in group], list(unflatten_master_params(group, master.view(-1)))
        )


def unflatten_master_params(param_group: Sequence[tuple[str, Tensor]], master_param: Tensor) -> tuple[Tensor, ...]:
    """Views of a flat tensor in the shapes of a group's parameters."""
    parts = master_param.split([parameter.numel() for _, parameter in param_group])
    return tuple(part.view(parameter.shape) for part, (_, parameter) in zip(parts, param_group, strict=True))


def master_params_to_state_dict(
    model: nn.Module,
    param_groups_and_shapes: Iterable[Group] | None,
    master_params: Sequence[Tensor],
    use_fp16: bool,
) -> dict[str, Tensor]:
    """The model's state dict with master parameters, or averages of them, in place of its parameters."""
    state_dict = model.state_dict()
    if use_fp16:
        assert param_groups_and_shapes is not None
        for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
            views = unflatten_master_params(group, master.detach().view(-1))
            state_dict.update((name, view) for (name, _), view in zip(group, views, strict=True))
    else:
        names = [name for name, _ in model.named_parameters()]
        state_dict.update(zip(names, master_params, strict=True))
    return state_dict


def state_dict_to_master_params(model: nn.Module, state_dict: dict[str, Tensor], use_fp16: bool) -> list[Tensor]:
    """Master parameters of a state dict; in float32 its tensors themselves."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return list(make_master_params(get_param_groups_and_shapes(named)))
    return [tensor for _, tensor in named]


def zero_master_grads(master_params: Iterable[Tensor]) -> None:
    """Forget the gradients of master parameters."""
    for parameter in master_params:
        parameter.grad = None


@torch.no_grad()
def zero_grad(model_params: Iterable[Tensor]) -> None:
    """Fill gradients with zeros; parameters without one stay so."""
    gradients = [parameter.grad.detach_() for parameter in model_params if parameter.grad is not None]
    if gradients:
        torch._foreach_zero_(gradients)


def param_grad_or_zeros(param: Tensor) -> Tensor:
    """The gradient of a parameter, or zeros like it."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


class MixedPrecisionTrainer:
    """Backward pass and optimizer step of a model, in float32 or with `use_fp16`.

    The loss is scaled by 2^lg_loss_scale, which grows by fp16_scale_growth after every step taken; a gradient that is
    infinite or NaN takes 1 off, and no step is taken.

    Raises: FloatingPointError: at the smallest loss scale that makes sense, they still are.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ) -> None:
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.model_params = list(model.parameters())
        self.master_params: list[Any] = self.model_params
        self.param_groups_and_shapes: list[Group] | None = None
        if use_fp16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = list(make_master_params(self.param_groups_and_shapes))
            model.convert_to_fp16()  # type: ignore[operator]  # a UNetModel's

    def zero_grad(self) -> None:
        """Before the first `backward` of a step."""
        zero_grad(self.model_params)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the (scaled) loss to the parameters' own."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """Take a step of `opt`, an optimizer of `master_params`; False where the gradient is infinite or NaN."""
        return self._optimize_fp16(opt) if self.use_fp16 else self._optimize_normal(opt)

    def _optimize_fp16(self, opt: torch.optim.Optimizer) -> bool:
        assert self.param_groups_and_shapes is not None
        logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
        grad_norm, param_norm = self._compute_norms(grad_scale=2**self.lg_loss_scale)
        if check_overflow(grad_norm):
            self.lg_loss_scale -= 1
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
            zero_master_grads(self.master_params)
            if self.lg_loss_scale < _LEAST_LOG_LOSS_SCALE:
                raise FloatingPointError(
                    f"gradients are infinite or NaN down to a loss scale of 2^{self.lg_loss_scale:g}: the loss or the "
                    "weights are NaN; go on from an earlier checkpoint"
                )
            return False
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)
        torch._foreach_mul_([parameter.grad for parameter in self.master_params], 2**-self.lg_loss_scale)
        opt.step()
        zero_master_grads(self.master_params)
        master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
        self.lg_loss_scale += self.fp16_scale_growth
        return True

    def _optimize_normal(self, opt: torch.optim.Optimizer) -> bool:
        grad_norm, param_norm = self._compute_norms()
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)
        opt.step()
        return True

    @torch.no_grad()
    def _compute_norms(self, grad_scale: float = 1.0) -> tuple[float, float]:
        """(norm of all gradients / grad_scale, norm of all master parameters), in one read from the device."""
        gradients = [parameter.grad for parameter in self.master_params if parameter.grad is not None]
        norms = [_norm(tensors) for tensors in (gradients, self.master_params) if tensors]
        *grad_norm, param_norm = torch.stack(norms).tolist()
        return (grad_norm[0] / grad_scale if grad_norm else 0.0), param_norm

    def master_params_to_state_dict(self, master_params: Sequence[Tensor]) -> dict[str, Tensor]:
        """See the function of this name."""
        return master_params_to_state_dict(self.model, self.param_groups_and_shapes, master_params, self.use_fp16)

    def state_dict_to_master_params(self, state_dict: dict[str, Tensor]) -> list[Tensor]:
        """See the function of this name."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all elements: of each tensor in float32, and of those in float64, which does not overflow."""
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
    return norms.double().norm()


def check_overflow(value: float) -> bool:
    """Whether a number is infinite or NaN."""
    return not math.isfinite(value)
