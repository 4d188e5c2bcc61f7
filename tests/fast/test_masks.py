"""Dropout of the optimised network: which draw each layer is given."""

import torch

from cmfast import ops
from cmfast.fast import optimize
from tests.fast.networks import inputs
from tests.golden_utils import small_unet


def test_masks_differ_from_layer_to_layer(monkeypatch):
    """Draws 0, 1, ... of one seed for the residual blocks, and samples 0, 1, ... of the batch."""
    model = small_unet(dropout=0.3)
    draws, operation = [], ops.group_norm_silu

    def record(*args, draw=None, **options):
        draws.append(draw)
        return operation(*args, draw=draw, **options)

    monkeypatch.setattr(ops, "group_norm_silu", record)
    with torch.no_grad():
        optimize(model)(*inputs(model))
    draws = [draw for draw in draws if draw is not None]
    blocks = sum(type(module).__name__ == "ResBlock" for module in model.modules())
    assert [draw.draw for draw in draws] == list(range(blocks))
    assert all(draw.seed is draws[0].seed and draw.index.tolist() == [0, 1, 2] for draw in draws)
