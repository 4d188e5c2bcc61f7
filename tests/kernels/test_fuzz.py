"""Shapes, strides, dtypes and noise levels drawn by hypothesis: kernels against the reference."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from cmfast.kernels import group_norm_tiles
from cmfast.ops._dispatch import FUSED
from tests.ops import norms
from tests.ops.cases import CASES
from tests.ops.matrix import Call, close, make

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
st = hypothesis.strategies

from tests.fuzz.run import fuzz, settings  # noqa: E402
from tests.fuzz.strategies import LAYOUTS, lay  # noqa: E402

LEVELS = [1e-44, 1e-38, 0.002, 0.5, 1.0, 80.0, 1e4]


@pytest.mark.parametrize("name", FUSED)
def test_any_call(name, device, guard, record_property):
    """The kernel against the reference; how calls are drawn stands in tests/fuzz/strategies.py."""
    fuzz(name, "triton", 2, record_property, device=device, after=guard.check)


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
    kinds = st.sampled_from([kind for kind in LAYOUTS if kind != "expanded"])
    tensors = {k: lay(v, draw(kinds), draw(st.integers(0, v.ndim - 1))) for k, v in norm.tensors.items()}
    tiles = {
        "WHOLE": draw(st.sampled_from([(0, 0), (2048, 1024), (2**20, 2**20)])), "BLOCK": (256, 256),
        "PART": draw(st.sampled_from([16, 64])), "ENOUGH": draw(st.sampled_from([1, 16])), "FOLD": 32,
        "MANY": draw(st.sampled_from([1, 16])), "LEAST": 16,
    }  # fmt: skip
    return norms.Norm(tensors, groups, norm.options), tiles


@hypothesis.given(normalisations())
@settings(20)
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
