"""A pair of kernels, forward and backward, as a differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmfast.reference import Draw
from cmfast.reference._common import in_transform

Forward = Callable[..., Any]
Result = TypeVar("Result")


def fused(
    forward: Forward,
    backward: Callable[..., Any],
    reference: Callable[..., Result],
    *inputs: Any,
    keep: int = 0,
    c_noise: tuple[int, ...] = (),
    **options: Any,
) -> Result:
    """The kernels `forward(*inputs, **options)`, differentiable by `backward(needed, grads, *inputs, **options)`.

    `keep`: how many of the last results are for the backward pass, which gets them as `saved`, and not returned.
    Not inside of a torch.func transform: callers take the reference there.
    `c_noise`: the results that come from noise levels alone, of which `forward` makes [B], or [1] for one level. What
    `backward` returns None for (gradients of noise levels), and gradients of gradients, come from the reference.
    """
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        results = _Fused.apply(forward, backward, reference, (keep, c_noise), options, *inputs)
    else:
        results = _tuple(forward(*inputs, **options))
    if c_noise:
        # Not in the function: AOTAutograd of torch 2.11 fails at results that are views and have no gradient.
        batch = results[0].shape[0]
        results = tuple(
            x.expand(batch) if i in c_noise and x.shape[0] != batch else x for i, x in enumerate(results)
        )
    returned: Any = results[: len(results) - keep]
    return returned[0] if len(returned) == 1 else returned


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def saved(*values: Any) -> tuple[Tensor | None, ...]:
    """The tensors among the values, as save_for_backward takes them: of one made in inference mode, a copy."""
    tensors = (x if isinstance(x, Tensor) else None for x in values)
    if torch.compiler.is_compiling():
        return tuple(tensors)
    return tuple(x.clone() if x is not None and x.is_inference() else x for x in tensors)


def stands_for_many(*grads: Tensor | None) -> bool:
    """Whether a gradient is one of `is_grads_batched`, or of vmap: these go through ordinary operations."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch  # pyright: ignore  # made at run time
    kinds = functorch.is_legacy_batchedtensor, functorch.is_batchedtensor
    return any(is_kind(grad) for is_kind in kinds for grad in grads if grad is not None)


def without_hooks() -> AbstractContextManager[object]:
    """For gradients that a forward pass makes. Hooks of the caller, such as torch.utils.checkpoint's, are for what is
    kept beyond this pass."""
    allowed = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]  # torch has no type of it
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself) if allowed else nullcontext()


def _itself(x: Tensor) -> Tensor:
    return x


class _Fused(torch.autograd.Function):
    # Not with a setup_context of its own: for that torch looks at the signature in every call, a fifth of a small one.
    @staticmethod
    def forward(
        ctx: Any, forward: Forward, backward: Any, reference: Forward, special: Any, options: Any, *arguments: Any
    ) -> Any:
        ctx.kernel, ctx.reference, (ctx.keep, c_noise), ctx.options = backward, reference, special, options
        # A tuple always: Dynamo wants one.
        output = _tuple(forward(*arguments, **options))
        kept = output[len(output) - ctx.keep :]
        levels_vary = any(isinstance(x, Tensor) and x.ndim <= 1 and x.requires_grad for x in arguments)
        ctx.mark_non_differentiable(*kept, *(() if levels_vary else [output[i] for i in c_noise]))
        ctx.set_materialize_grads(False)
        # Gradients of levels draw the noise again: of numbers that changed meanwhile, autograd says so.
        drawn = [part for x in arguments if isinstance(x, Draw) for part in x] if levels_vary else []
        ctx.save_for_backward(*saved(*arguments), *kept, *saved(*drawn))
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.others)
        held = ctx.saved_tensors  # once: torch.utils.checkpoint makes them again for one look
        inputs = [other if x is None else x for x, other in zip(held[:count], ctx.others)]
        needed, grads = ctx.needs_input_grad[5:], grads[: len(grads) - ctx.keep]
        results: list[Tensor | None] = [None] * count
        if not torch.is_grad_enabled() and not stands_for_many(*grads):
            kept = {"saved": held[count : count + ctx.keep]} if ctx.keep else {}
            results = list(ctx.kernel(needed, grads, *inputs, **kept, **ctx.options))
        missing = [i for i in range(count) if needed[i] and results[i] is None]
        if missing:
            for i, grad in zip(missing, reference_grads(ctx.reference, inputs, missing, grads, ctx.options)):
                results[i] = grad
        return None, None, None, None, None, *results


def reference_grads(
    reference: Forward, inputs: list[Any], wanted: list[int], grads: tuple[Tensor | None, ...], options: dict[str, Any]
) -> tuple[Tensor | None, ...]:
    """Gradients of `inputs[i] for i in wanted` by differentiating the reference, differentiable if grad mode is on."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias each: one tensor may stand for two inputs.
        inputs = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
        # Nobody may ask for gradients inside of a transform, but those that there are need none.
        own = differentiable or in_transform()
        leaves = [inputs[i] if own else inputs[i].detach().requires_grad_() for i in wanted]
        for i, leaf in zip(wanted, leaves):
            inputs[i] = leaf
        result = reference(*inputs, **options)
        # c_noise of one level was [1] before it was expanded: one of the reference's stands for it.
        pairs = [
            (value, grad) if value.shape == grad.shape else (value[:1], grad[: len(value)])
            for value, grad in zip(_tuple(result), grads)
            if grad is not None and value.requires_grad
        ]
        if not pairs:
            return (None,) * len(wanted)
        values, given = zip(*pairs)
        return torch.autograd.grad(values, leaves, given, create_graph=differentiable, allow_unused=True)
