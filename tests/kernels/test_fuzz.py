"""Shapes, strides, dtypes and noise levels drawn by hypothesis: kernels against the reference."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from cmfast.kernels import group_norm_tiles
from tests.ops import norms
from tests.ops.cases import CASES, OUTPUTS
from tests.ops.matrix import DTYPES, Call, check_path, close, make

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
st = hypothesis.strategies

LEVELS = [1e-44, 1e-38, 0.002, 0.5, 1.0, 80.0, 1e4]


def strided(x: torch.Tensor, kind: str, axis: int) -> torch.Tensor:
    """The numbers of x, lying otherwise in memory."""
    if kind == "transposed" and x.ndim > 1:
        other = (axis + 1) % x.ndim
        return x.transpose(axis, other).contiguous().transpose(axis, other)
    if kind == "sliced":
        return torch.stack([x, x.flip(axis)], dim=axis + 1).select(axis + 1, 0)
    if kind == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if kind == "channels last" and x.ndim in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x


@st.composite
def calls(draw):
    """A case, with inputs of a shape, each lying in memory in its own way."""
    name = draw(st.sampled_from(sorted(CASES)))
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13]), min_size=1, max_size=5)))
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([0, 1, 3])), *shape[1:])
    call = make(CASES[name], shape, draw(st.sampled_from(DTYPES)), "cpu", seed=draw(st.integers(0, 99)))
    kinds = st.sampled_from(["plain", "transposed", "sliced", "offset", "channels last"])
    axes = st.integers(0, len(shape) - 1)
    # Network outputs lie alike, as a network's do; so may anything else.
    states = {k: strided(v, draw(kinds), draw(axes)) for k, v in call.states.items()}
    sigmas = {k: v[0] if draw(st.booleans()) and len(v) else v for k, v in call.sigmas.items()}
    return name, Call(call.case, states, sigmas, call.dtype)


@hypothesis.given(calls())
@hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
def test_any_shape_and_stride(device, drawn):
    _, call = drawn
    states = {k: v.to(device) for k, v in call.states.items()}
    check_path(Call(call.case, states, {k: v.to(device) for k, v in call.sigmas.items()}, call.dtype), "triton")


@st.composite
def normalisations(draw):
    """A call of group_norm_silu, and the sizes of its tiles."""
    groups, group = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 5, 8]), max_size=3))
    shape = (draw(st.sampled_from([0, 1, 3])), groups * group, *sizes)
    # Of one element in a group, or two, all gradients but rounding are zero: they are plus and minus one deviation.
    hypothesis.assume(group * math.prod(sizes) >= 8)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    kind, seed = draw(st.sampled_from(sorted(norms.KINDS))), draw(st.integers(0, 99))
    norm = norms.make(shape, groups, kind, dtype=dtype, last=draw(st.booleans()), seed=seed)
    kinds = st.sampled_from(["plain", "transposed", "sliced", "offset", "channels last"])
    tensors = {k: strided(v, draw(kinds), draw(st.integers(0, v.ndim - 1))) for k, v in norm.tensors.items()}
    tiles = {
        "WHOLE": draw(st.sampled_from([(0, 0), (2048, 1024), (2**20, 2**20)])), "BLOCK": (256, 256),
        "PART": draw(st.sampled_from([16, 64])), "ENOUGH": draw(st.sampled_from([1, 16])), "FOLD": 32,
    }  # fmt: skip
    return norms.Norm(tensors, groups, norm.options), tiles


@hypothesis.given(normalisations())
@hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
def test_any_normalisation(device, drawn):
    norm, tiles = drawn
    tensors = {k: v.to(device) for k, v in norm.tensors.items()}
    options = dict(norm.options)
    if "draw" in options:
        options["draw"] = options["draw"]._replace(index=options["draw"].index.to(device))
    with mock.patch.multiple(group_norm_tiles, **tiles):
        norms.check_path(norms.Norm(tensors, norm.num_groups, options), "triton")


@pytest.mark.parametrize("sigma", LEVELS, ids=str)
@pytest.mark.parametrize("name", ["scale_input", "denoise", "add_noise", "renoise", "euler_step", "heun_corrector"])
def test_any_noise_level(name, sigma, device):
    """From a denormal number to far beyond sigma_max."""
    call = make(CASES[name], (2, 3, 4, 4), (torch.float32, torch.float32), device)
    sigmas = {k: torch.full_like(v, sigma * 0.5**i) for i, (k, v) in enumerate(call.sigmas.items())}
    call = Call(call.case, call.states, sigmas, call.dtype)
    exact = call.to(torch.float64).run("reference")
    for i, (value, eager, high) in enumerate(zip(call.run("triton"), call.run("reference"), exact, strict=True)):
        # The reference divides by the level, and overflows; kernels take ratios of levels, and need not.
        close(value, eager if eager.isfinite().all() else high.to(eager.dtype), high, f"result {i}")


def test_outputs_are_named():
    """The fuzz lays network outputs out by these names."""
    assert set(OUTPUTS) <= {k for case in CASES.values() for k in case.states}
