"""The fused operations through pytest-benchmark: `pytest benchmarks --benchmark-only [-k "denoise and 3x64x64"]`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmfast.benchmarks import timing
from cmfast.benchmarks.cases import CASES, Config, configs, make_inputs
from cmfast.benchmarks.kernels import PLAIN, check, contender, inductor_refusal, providers_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = [(config, name) for config in configs(DEVICE.type) for name in providers_for(config)]


@pytest.mark.parametrize("config, provider", PAIRS, ids=[f"{config} {name}" for config, name in PAIRS])
def test_kernel(config: Config, provider: str, benchmark: Any) -> None:
    """The gate, then calls that rotate over cold inputs, each round ending when the device has finished."""
    refusal = inductor_refusal(DEVICE)
    if refusal and provider not in PLAIN:
        pytest.skip(refusal)
    torch._dynamo.reset()
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size if DEVICE.type == "cuda" else None
    sets = make_inputs(config, timing.sets_for(config.floor_bytes, l2_bytes), DEVICE, seed=0)
    candidate = contender(provider, config, DEVICE, sets)
    assert not check(config, DEVICE, {provider: candidate}, sets[-1])

    def call() -> None:
        candidate.calls(1)
        if candidate.position == 0:
            timing.synchronize(DEVICE)

    benchmark.group = str(config)
    benchmark.extra_info.update(
        device=DEVICE.type, floor=str(CASES[config.case].floor), floor_bytes=config.floor_bytes, input_sets=len(sets)
    )
    benchmark.pedantic(call, iterations=len(sets), rounds=30, warmup_rounds=3)
