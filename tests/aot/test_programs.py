"""Every kernel, as it is launched, compiled ahead of time for every architecture we name, and what its program shows.

Runs without a GPU. Triton's interpreter replaces the compiler, so that the two cannot share a process.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is no compiler")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import cmfast.kernels
from cmfast import ops
from cmfast.ops import _dispatch
from tests.aot import evidence
from tests.aot.record import Launch, launches_of, recording
from tests.aot.uses import USES, step

if _dispatch.INTERPRETING:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted here, not compiled", allow_module_level=True)
if evidence.missing_tools():
    pytest.skip(f"this Triton has no {' and no '.join(evidence.missing_tools())}", allow_module_level=True)

SM_90 = GPUTarget("cuda", 90, 32)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": SM_90,
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@pytest.fixture(scope="module")
def launches():
    """Every launch of every use."""
    return {use: launches_of(use.call) for use in USES.values()}


@dataclass(frozen=True)
class Findings:
    """Of a launch: faults in words, whether accesses are narrow that need not be wide, and whether it has an
    exponential that it may have."""

    faults: list[str]
    narrow: bool
    exponential: bool


@pytest.fixture(scope="module")
def findings(report):
    """Findings of a launch on a target; launches that share a program share its compilation."""
    known: dict[tuple, Findings] = {}

    def examine(launch: Launch, target: GPUTarget, exempt: tuple[str, ...], exponential: bool) -> Findings:
        program = launch.compile(target)
        found = {name: check(program) for name, check in evidence.CHECKS.items()}
        needed = evidence.narrow_accesses(program, exempt)
        narrow = found["narrow accesses"] != needed
        found["narrow accesses"] = needed + (evidence.narrow_in_sass(program) if target == SM_90 else [])
        approximate = found["approximate arithmetic"]
        allowed = [fault for fault in approximate if exponential and fault == evidence.EXPONENTIAL]
        found["approximate arithmetic"] = [fault for fault in approximate if fault not in allowed]
        report.programs[target.arch] += 1
        faults = [f"{launch.name}: {name}: {fault}" for name in found for fault in found[name]]
        return Findings(faults, narrow, bool(allowed))

    def findings_of(launch: Launch, target: GPUTarget, exempt: tuple[str, ...], exponential: bool) -> Findings:
        key = *launch.key(target), exempt, exponential
        if key not in known:
            known[key] = examine(launch, target, exempt, exponential)
        return known[key]

    return findings_of


#: What Triton 3.6, whose ptxas is older, keeps of one program's threads in memory on sm_80, of one layout alone.
OF_TRITON_3_6 = (80, "_draw_pair_fwd_kernel: spills: STACK is 8")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_program_is_sound(use, target, launches, findings):
    found = [findings(launch, target, use.exempt, use.exponential) for launch in launches[use]]
    faults = [fault for each in found for fault in each.faults]
    if triton.__version__.startswith("3.6."):
        faults = [fault for fault in faults if (target.arch, fault) != OF_TRITON_3_6]
    assert found
    assert not faults, "\n".join(faults)
    assert any(each.narrow for each in found) == bool(use.exempt), "an exemption that nothing needs"
    if target.backend == "cuda":
        assert any(each.exponential for each in found) == use.exponential, "an exponential that is not there"


@pytest.mark.parametrize("op", [ops.radam_ema_, ops.adam_ema_], ids=["RAdam", "Adam"])
def test_a_schedule_of_betas_makes_no_programs(op):
    """Nor does one of any other number: a learning rate that follows one cycle changes beta1 at every step."""
    keys = []
    for n in (0.5, 0.9, 0.875, 0.95):
        numbers = {"lr": n, "betas": (n, n), "eps": n * 1e-8, "weight_decay": n, "max_norm": n}
        keys += [launch.key(SM_90) for launch in launches_of(step(op, 1, **numbers))]
    assert len(keys) == 4 * len(set(keys))


def test_every_kernel_is_launched(launches, report):
    names = [module.name for module in pkgutil.iter_modules(cmfast.kernels.__path__)]
    kernels = {
        kernel.fn.__name__
        for module in names
        for name, kernel in vars(importlib.import_module(f"cmfast.kernels.{module}")).items()
        if isinstance(kernel, JITFunction) and name.endswith("_kernel")
    }
    launched = [launch.name for each in launches.values() for launch in each]
    report.launches = len(launched)
    assert kernels and kernels == set(launched)


@triton.jit
def _randn_kernel(out_ptr, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.randn(seed, at.to(tl.uint32)))


def test_a_normal_number_costs_few_instructions(launches, report):
    """All of the kernel counts, its addresses and its slow paths of square roots too. tl.randn takes a sine and a
    cosine with a reduction for large angles, which ours never are: a hundred instructions are well below it."""
    (launch,) = launches[USES["normal"]]
    ours = evidence.instructions_per_element(launch.compile(SM_90))
    options = {key: launch.options[key] for key in ("num_warps", "enable_fp_fusion")}
    with recording() as recorded:
        _randn_kernel[(1,)](torch.empty(1024), 7, BLOCK=1024, **options)
    theirs = evidence.instructions_per_element(recorded[0].compile(SM_90))
    report.notes.append(f"instructions per normal on sm_90: {ours:.1f}, tl.randn {theirs:.1f}")
    assert ours < 100 < theirs


@triton.jit
def _approximate_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.sqrt(x / (x + 3.0)))


@triton.jit
def _spilling_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK * 32).to(tl.int64)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x * tl.sum(x))


@triton.jit
def _strided_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK).to(tl.int64)
    tl.store(out_ptr + at, tl.load(x_ptr + 2 * at))


@triton.jit
def _strided_tile_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK // 32)[:, None].to(tl.int64), tl.arange(0, 32)[None, :].to(tl.int64)
    # As wide as they should be, and of another argument.
    wide = tl.load(x_ptr + row * 32 + column) + tl.load(x_ptr + 1024 + row * 32 + column)
    tl.store(x_ptr + row * 32 + column, wide)
    tl.store(out_ptr + (row * 32 + column) * 2, wide)


@triton.jit
def _wrapping_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _late_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = (tl.program_id(0) * BLOCK).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    "kernel, fault",
    [
        (_approximate_kernel, "approximate arithmetic"),
        (_spilling_kernel, "spills"),
        (_strided_kernel, "narrow accesses"),
        (_strided_tile_kernel, "narrow accesses"),
        (_wrapping_kernel, "narrow offsets"),
        (_late_kernel, "narrow offsets"),
    ],
    ids=lambda value: value.fn.__name__ if isinstance(value, JITFunction) else value,
)
def test_a_bad_kernel_is_found(kernel, fault, target):
    with recording() as recorded:
        kernel[(1,)](torch.empty(1024), torch.empty(1024), BLOCK=1024, num_warps=1, enable_fp_fusion=True)
    program = recorded[0].compile(target)
    assert [name for name, check in evidence.CHECKS.items() if check(program)] == [fault]
