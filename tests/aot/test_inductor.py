"""Every kernel as torch.compile takes it, whose numbers come otherwise than those of a launch. Runs without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is no compiler")

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from triton.backends.compiler import GPUTarget

from cmfast.ops import _autograd, _dispatch
from tests.aot import evidence
from tests.aot.record import Launch, launches_of, recording, ttir
from tests.aot.uses import USES
from tests.ops.cases import CASES

if _dispatch.INTERPRETING:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted here, not compiled", allow_module_level=True)

SM_90 = GPUTarget("cuda", 90, 32)

#: What the kernels of a use write, launch by launch. These draw, so that torch.compile keeps them.
WRITTEN = {
    "normal": ["out"],
    "init_noise, drawn": ["x_t model_input c_noise"],
    "add_noise_pair drawn": ["x_t model_input c_noise x_t_2 model_input_2 c_noise_2"],
    "renoise drawn": ["x_next model_input c_noise", "grad_output"],
    "renoise drawn by tensors": ["x_next model_input c_noise"],
    "draw_pair": ["x_t model_input c_noise x_t_2 model_input_2 c_noise_2 sigma next_sigma"],
    "draw_pair lognormal, one point": ["x_t model_input c_noise sigma"],
    "dropout": ["y", "y"],
    "group_norm_silu, 768 of 8x8, dropout": [
        "y moments", "grad_x grad_scale grad_shift per_sample x_bias_partial",
    ],
    "group_norm_silu, 384 of 64x64, sum, dropout": [
        "partial total", "affine moments", "y",
        "partial", "means grad_scale grad_shift per_sample", "grad_x x_bias_partial",
    ],
}  # fmt: skip


def widened(launch: Launch) -> list[str]:
    """Operations on float64 that a launch does not have, and inductor's program has."""
    found = evidence.float64(ttir(*launch.inductors_program(SM_90), SM_90))
    more = found - evidence.float64(ttir(*launch.program(SM_90), SM_90)) if found else found
    return [f"{launch.name}: {count} {op} of float64" for op, count in more.items()]


@pytest.fixture(scope="module")
def widened_once():
    """`widened` of each program once."""
    known: dict[str, list[str]] = {}

    def of(launch: Launch) -> list[str]:
        key = launch.inductors_program(SM_90)[0].hash()
        if key not in known:
            known[key] = widened(launch)
        return known[key]

    return of


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_numbers_as_inductor_passes_them(use, widened_once):
    """Programs are made, and have float64 where the kernel asks for it alone."""
    assert not [fault for launch in launches_of(use.call) for fault in widened_once(launch)]


@pytest.mark.parametrize("name", WRITTEN)
def test_torch_knows_what_is_written(name, monkeypatch):
    """Of a kernel that it cannot read torch.compile takes all tensors as written, and copies them. Torch 2.11 reads it
    with all numbers as constants."""
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: SM_90))
    found = []
    for launch in launches_of(USES[name].call):
        tensors = {key: value for key, value in launch.named.items() if isinstance(value, Tensor)}
        constants = {key: value for key, value in launch.named.items() if key not in tensors}
        indices = kernel_side_table.add_kernel(launch.kernel), kernel_side_table.add_constant_args(constants)
        found.append({key.removesuffix("_ptr") for key in get_mutated_tensors(*indices, tensors, {})})
    assert found == [set(names.split()) for names in WRITTEN[name]]


@pytest.mark.parametrize("levels", [(), (2,)], ids=["one level", "levels"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_of_a_function_are_no_views(case, levels, monkeypatch):
    """AOTAutograd of torch 2.11 fails at a view that has no gradient, as c_noise expanded to [B] is."""
    forward = _autograd._Fused.forward
    views = []

    def watched(*arguments):
        results = forward(*arguments)
        views.append([i for i, result in enumerate(results) if result._is_view()])
        return results

    monkeypatch.setattr(_autograd._Fused, "forward", staticmethod(watched))
    states = {key: torch.empty(2, 3, 8, 8).requires_grad_() for key in case.states}
    launches_of(lambda: case.call(states, {key: torch.ones(levels) for key in case.sigmas}))
    assert not any(views)


@triton.jit
def _squaring_kernel(out_ptr, x_ptr, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK).to(tl.int64)
    tl.store(out_ptr + at, tl.load(x_ptr + at) * (factor * factor))


def test_a_bad_kernel_is_found():
    with recording() as recorded:
        _squaring_kernel[(1,)](torch.empty(1024), torch.empty(1024), 0.5, BLOCK=1024)
    assert "_squaring_kernel: 1 arith.mulf of float64" in widened(recorded[0])
