"""Dropout of the optimised network: which draw each layer is given."""

import pytest
import torch

from cmfast import dropout, ops
from cmfast.fast import optimize
from cmfast.tolerances import FAST_VALUE
from tests.fast.networks import inputs, run
from tests.golden_utils import relative_error, small_unet


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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_block_that_occurs_twice_has_one_number(checkpointed):
    """In both passes: inside `paired` it drops the same elements both times, and outside it draws twice."""
    model = small_unet(dropout=0.3, use_checkpoint=checkpointed)
    model.middle_block[2] = model.middle_block[0]
    fast, args = optimize(model), inputs(model)
    with dropout.paired(ops.Draw(5, torch.arange(3))):
        (out, grads), (wanted, wanted_grads) = run(fast, args), run(model, args)
    assert fast.refusal is None and relative_error(out, wanted) < FAST_VALUE
    scale = max(grad.abs().max().item() for grad in wanted_grads.values())
    assert all((grads[name] - grad).abs().max() < 1e-4 * scale for name, grad in wanted_grads.items())


def test_everything_is_dropped():
    """Which takes no draw."""
    model = small_unet(dropout=1.0)
    state = torch.get_rng_state()
    (out, grads), (wanted, wanted_grads) = run(optimize(model), inputs(model)), run(model, inputs(model))
    assert relative_error(out, wanted) < FAST_VALUE and torch.equal(torch.get_rng_state(), state)
    scale = max(grad.abs().max().item() for grad in wanted_grads.values())
    assert all((grads[name] - grad).abs().max() < 1e-4 * scale for name, grad in wanted_grads.items())
    assert not grads["middle_block.0.out_layers.3.weight"].any()
