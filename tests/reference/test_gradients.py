"""Derivatives of the references against finite differences, first and second, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cmfast
from cmfast import ops
from tests.ops import norms, perceptual
from tests.ops.cases import CASES, flat, inputs


def check(call, leaves: dict[str, torch.Tensor]) -> None:
    """First derivatives of a function of tensors by name, then second ones where the first depend on anything."""
    names = list(leaves)
    values = [leaf.detach().double().requires_grad_() for leaf in leaves.values()]

    def function(*arguments):
        with cmfast.backend("reference"):
            return tuple(r for r in flat(call(dict(zip(names, arguments)))) if r.requires_grad)

    assert gradcheck(function, values)
    assert gradgradcheck(function, values, atol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_of_every_case(case):
    """Every state and noise level that has a gradient."""
    states, sigmas = inputs(case, (2, 1, 2, 1))
    every = states | sigmas
    leaves = {k: v for k, v in every.items() if k not in case.no_grad_to}

    def call(given):
        now = every | given
        return case.call({k: now[k] for k in states}, {k: now[k] for k in sigmas})

    check(call, leaves)


@pytest.mark.parametrize("kind", norms.KINDS)
def test_of_group_norm(kind):
    norm = norms.make((1, 4, 3, 1), 2, kind).to(torch.float64)
    check(norm.call, norm.tensors)


def test_of_lpips():
    layer = perceptual.layer((1, 3, 2, 1)).to(torch.float64)
    check(lambda given: layer.function(**given), {k: v + 0.1 for k, v in layer.tensors.items()})
    image = perceptual.images((1, 3, 2, 2), (3, 3)).to(torch.float64)
    check(lambda given: image.function(**given, **image.options), image.tensors)


def test_of_dropout():
    x = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    check(lambda given: ops.dropout(given["x"], 0.5, ops.Draw(0, torch.tensor([0]))), {"x": x})


@pytest.mark.parametrize("function", [ops.scalings, ops.c_noise, *(
    lambda sigma, name=name: ops.loss_weight(sigma, name) for name in ops.WEIGHTINGS if name != "uniform"
)], ids=["scalings", "c_noise", *(name for name in ops.WEIGHTINGS if name != "uniform")])  # fmt: skip
def test_of_noise_levels(function):
    check(lambda given: function(given["sigma"]), {"sigma": torch.tensor([0.002, 0.7, 3.0])})


def test_nothing_is_registered_with_torch_library():
    """The kernels are called through torch.autograd.Function alone; an operator that is registered needs opcheck."""
    assert not [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cmfast")]
