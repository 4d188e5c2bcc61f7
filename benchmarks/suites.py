"""The registry: every kind of benchmark by its name."""

from __future__ import annotations

from cmfast.benchmarks import doubling, kernels, parameters, perceptual, sampling, startup, training
from cmfast.benchmarks.runs import Suite

#: The important first.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        sampling.SUITE, training.SUITE, kernels.SUITE, parameters.SUITE, perceptual.SUITE, doubling.SUITE,
        startup.SUITE,
    )
}  # fmt: skip
