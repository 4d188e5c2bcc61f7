"""Fixtures for optimised networks."""

import pytest

from tests.fast.networks import CONFIGS, count_small_networks
from tests.golden_utils import small_unet


@pytest.fixture
def small_networks_count(monkeypatch):
    count_small_networks(monkeypatch)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return small_unet(**CONFIGS[request.param]).eval()
