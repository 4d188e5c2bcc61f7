"""Fixtures for optimised networks."""

import pytest

from cmfast.fast import winograd
from tests.fast.networks import CONFIGS
from tests.golden_utils import small_unet


@pytest.fixture
def winograd_for_small_networks(monkeypatch):
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 64)
    monkeypatch.setattr(winograd, "LEAST_WORK", 0)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return small_unet(**CONFIGS[request.param]).eval()
