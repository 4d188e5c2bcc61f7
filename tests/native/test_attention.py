"""Attention in C against float64, for every CPU that this one can be."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cmfast
from cmfast.native import attention
from cmfast.tolerances import FLOOR
from tests.native.common import CPUS

pytestmark = pytest.mark.skipif(attention.refusal() is not None, reason=f"Attention in C: {attention.refusal()}")
#: Samples, tokens, heads, their size: one token, panels and queries that are not full, more than is summed at once.
SHAPES = [(2, 1, 3, 32), (1, 37, 2, 64), (3, 64, 1, 96), (1, 700, 2, 32), (1, 12, 1, 256)]


def given(batch, tokens, heads, dim) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.randn(batch, tokens, 3, heads, dim)


def ordinary(qkv: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, cpu, scale):
    """Also where few keys have all of the weight."""
    qkv = given(*shape)
    qkv[:, :, :2] *= scale**0.5
    made, eager, exact = attention.attend(qkv, cpu), ordinary(qkv), ordinary(qkv.double())
    error, of_eager = ((x.double() - exact).abs().max() for x in (made, eager))
    assert error <= 2 * of_eager + 4 * FLOOR[torch.float32] * exact.abs().max()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("sign", [1, -1])
def test_products_beyond_what_an_exponential_takes(cpu, sign):
    """All far below or above zero, where what fills a panel would weigh more, or less."""
    qkv = given(1, 37, 2, 32)
    qkv[:, :, 0], qkv[:, :, 1] = 40.0, sign * 40 + 0.1 * qkv[:, :, 1]
    qkv[:, -2, 1] += 10  # which has nothing of the weight, since the last has all
    qkv[:, -1, 1] += 20
    torch.testing.assert_close(attention.attend(qkv, cpu), ordinary(qkv.double()).float(), rtol=1e-3, atol=1e-3)


def test_same_bits_for_any_batch_and_threads():
    qkv, before = given(4, 100, 3, 32), torch.get_num_threads()
    together = attention.attend(qkv)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(attention.attend(qkv), together)
            assert torch.equal(attention.attend(qkv[2:3]), together[2:3])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_beyond_is_read_or_written(monkeypatch, shape, cpu):
    margin, held = 256, []

    def empty(*size, dtype=torch.float32, device=None):
        held.append(torch.full((torch.Size(size).numel() + 2 * margin,), torch.nan))
        return held[-1][margin:-margin].view(size)

    qkv = empty(*given(*shape).shape).copy_(given(*shape))
    alone = attention.attend(qkv, cpu)
    monkeypatch.setattr(attention.torch, "empty", empty)
    made = attention.attend(qkv, cpu)
    monkeypatch.undo()
    assert torch.equal(made, alone) and alone.isfinite().all()
    assert all(flat[:margin].isnan().all() and flat[-margin:].isnan().all() for flat in held)


@pytest.mark.parametrize("which, rows", [(0, [5]), (1, list(range(20))), (2, list(range(20)))])
def test_nan_stays_with_its_query_or_its_head(which, rows):
    qkv = given(2, 20, 2, 32)
    qkv[1, 5, which, 1, 3] = torch.nan
    nan = attention.attend(qkv).isnan().any(-1)
    assert nan.nonzero().tolist() == [[1, row, 1] for row in rows]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x.double(), id="float64"),
        pytest.param(lambda x: x[..., :16].contiguous(), id="size"),
        pytest.param(lambda x: x[:, ::2], id="strides"),
        pytest.param(lambda x: x[:0], id="empty"),
        pytest.param(lambda x: x.requires_grad_(), id="gradients"),
        pytest.param(lambda x: x.new_empty(1, attention.MOST_TOKENS + 1, 3, 1, 32), id="tokens"),
    ],
)
def test_what_it_does_not_do(change):
    assert attention.fits(given(1, 8, 2, 32)) and not attention.fits(change(given(1, 8, 2, 32)))


def test_who_looks_on_sees_pytorchs():
    qkv = given(1, 8, 2, 32)
    with TorchDispatchMode():
        assert not attention.fits(qkv)


@pytest.mark.parametrize("records", [False, True])
def test_layers_of_a_network(monkeypatch, records):
    """Those of `optimize` take it where no gradient is recorded, with the values of the ordinary pass."""
    calls, attend = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda qkv: calls.append(qkv.shape) or attend(qkv))
    model = cmfast.UNetModel(
        image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(1, 2),
        channel_mult=(1, 2), num_head_channels=32,
    ).eval()  # fmt: skip
    for parameter in model.parameters():  # zeros, some of them, where attention would have no part in the result
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 8, 8), torch.ones(2)
    with torch.set_grad_enabled(records):
        made = cmfast.optimize(model)(x, t)
        expected = model(x, t)
    assert {shape[:3] for shape in calls} == (set() if records else {(2, 64, 3), (2, 16, 3)})
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
