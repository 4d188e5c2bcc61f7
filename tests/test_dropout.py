"""Dropout that student and target share: drawn from counters, or from generators that are put back."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import cmfast
from cmfast import Denoiser, Preconditioner, losses, ops, reference
from cmfast.dropout import Dropout, counts, number, paired
from cmfast.fast import optimize
from cmfast.tolerances import FAST_VALUE
from tests.golden_utils import relative_error, small_unet
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.toy import ToyNetwork

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
T = torch.tensor([1.0, 20.0, 300.0, 4.0])
DRAW = ops.Draw(2**40 + 7, torch.tensor([3, 1, 2**33, 8]), 5)


class Counted(nn.Module):
    """F that is nothing but two dropout masks, by our layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Dropout(0.5), Dropout(0.5)
        number(self)

    def forward(self, x, t):
        return self.second(self.first(torch.ones_like(x)))


class Plain(nn.Module):
    """The same by torch's function."""

    def forward(self, x, t):
        return nn.functional.dropout(torch.ones_like(x), 0.5)


class PlainLayer(nn.Module):
    """And by torch's layer."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t):
        return self.drop(torch.ones_like(x))


@pytest.mark.parametrize("draw", [None, DRAW], ids=["generator", "counters"])
@pytest.mark.parametrize("network", [Counted, Plain, PlainLayer])
@pytest.mark.parametrize("teacher", [None, "teacher"])
def test_student_and_target_drop_the_same(network, teacher, draw):
    """With one mask in both, a small step between levels leaves a small difference; with two, a large one."""
    model = Denoiser(network())
    options = {"teacher_model": Denoiser(network(), Preconditioner.edm())} if teacher else {}
    for seed in range(3):
        torch.manual_seed(seed)
        given = None if draw is None else draw._replace(seed=seed)
        terms = losses.consistency_loss(model, model, X, 100_000, draw=given, **options)
        assert terms["loss"].max() < 1e-3


@pytest.mark.parametrize("network", [Counted, Plain])
def test_every_loss_with_a_target_of_its_own_drops_the_same(network):
    model = Denoiser(network())
    for seed in range(3):
        draw = DRAW._replace(seed=seed)
        terms = losses.improved_consistency_loss(model, X, 100_000, draw=draw, huber_c=0.0)
        # Divided by the difference of the levels: two masks would give 10^4 and more.
        assert terms["loss"].max() < 100.0
        terms = losses.easy_consistency_loss(Denoiser(network(), Preconditioner.edm()), X, 12, draw=draw)
        assert terms["loss"].max() < 100.0


def distillations(model, teacher, part=slice(None), draw=None):
    """The loss of each kind that has a teacher."""
    draw = None if draw is None else draw._replace(index=draw.index[part])
    options = {"teacher_model": teacher, "draw": draw}
    made = [losses.consistency_loss(model, model, X[part], 18, solver=solver, **options) for solver in losses.SOLVERS]
    made.append(losses.progressive_distillation_loss(model, teacher, X[part], 8, draw=draw))
    return torch.stack([terms["loss"] for terms in made])


def test_a_teacher_in_training_mode_drops_by_the_draw_too():
    """One that was left in it: a sample's loss is the same in any batch."""
    model, teacher = Denoiser(Counted()), Denoiser(Counted(), Preconditioner.edm())
    whole = distillations(model, teacher, draw=DRAW)
    halves = [distillations(model, teacher, part, DRAW) for part in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(halves, dim=1), whole)
    assert not torch.allclose(distillations(model, Denoiser(Counted(), Preconditioner.edm()).eval(), draw=DRAW), whole)


def test_a_loss_with_a_teacher_leaves_torchs_generator_where_the_student_does():
    """And does not have it go back to where the teacher began."""
    model, states = Denoiser(Plain()), []
    for teacher in (lambda x, sigma: x, Denoiser(Plain(), Preconditioner.edm())):
        torch.manual_seed(0)
        losses.progressive_distillation_loss(model, teacher, X, 8)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    torch.randn_like(X), torch.randint(0, 8, (4,)), model.network(X, T)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


def test_masks_are_counted():
    """Of layer k: `reference.dropout_mask` of the draw number that k is added to, under a seed of the draw."""
    model = Counted()
    with paired(ops.Draw(7, DRAW.index)):
        value = model(X, T)
        first = model.first(torch.ones_like(X))
    masks = [reference.dropout_mask(ops.Draw(7, DRAW.index, 2**31 + k), X.shape, 0.5) for k in range(2)]
    assert torch.equal(first, 2.0 * masks[0]) and torch.equal(value, 4.0 * (masks[0] & masks[1]))


def test_masks_follow_from_the_draw():
    """Seed, draw number and sample, as numbers or as tensors; and from nothing else."""
    model = Counted()

    def mask(draw, x=X):
        with paired(draw):
            return model(x, T) != 0

    expected = mask(DRAW)
    torch.manual_seed(1)
    assert torch.equal(mask(DRAW), expected)
    assert torch.equal(mask(ops.Draw(torch.tensor(DRAW.seed), DRAW.index, torch.tensor(5))), expected)
    assert torch.equal(mask(DRAW._replace(index=DRAW.index[1:]), X[1:]), expected[1:])
    for other in (DRAW._replace(seed=8), DRAW._replace(draw=6), DRAW._replace(index=DRAW.index + 1)):
        assert not torch.equal(mask(other), expected)
    with paired(DRAW), paired(DRAW._replace(seed=8)):
        pass
    assert 0.4 < expected.float().mean() * 2 < 0.6


def test_a_seed_of_fewer_bits():
    """Is mixed with the draw number in 64, as any."""
    x, layer = torch.ones(2, 8, 5), Dropout(0.5, layer=0)
    made = []
    for seed in (7, torch.tensor(7), torch.tensor(7, dtype=torch.int32)):
        with paired(ops.Draw(seed, torch.arange(2), 3)):
            made.append(layer(x))
    assert made[0].equal(made[1]) and made[0].equal(made[2])


def test_outside_it_is_torchs():
    """Bit for bit, also inside where a layer has no number, and in evaluation mode."""
    ours, plain = Dropout(0.3, layer=0), nn.Dropout(0.3)

    def both():
        results = []
        for layer in (ours, plain):
            torch.manual_seed(0)
            results.append(layer(X))
        return torch.equal(*results)

    assert both()
    ours.layer = None
    with paired(DRAW):
        assert both()
    ours.layer = 0
    with paired(DRAW):
        assert not both()
        ours.eval(), plain.eval()
        assert both()
        assert not Dropout(1.0, layer=0)(X).any() and torch.equal(Dropout(0.0, layer=0)(X), X)
    ours.train(), plain.train()
    assert both()


def passes(model, draw=DRAW):
    """F, and the gradients of x and of all weights."""
    x = X.clone().requires_grad_()
    with paired(draw):
        value = model(x, T)
    grads = torch.autograd.grad(value.square().sum(), [x, *model.parameters()])
    return [value.detach(), *grads]


@pytest.fixture(scope="module")
def unet():
    return small_unet(dropout=0.3)


@pytest.fixture(scope="module")
def expected(unet):
    return passes(unet)


def agree(values, expected):
    assert relative_error(values[0], expected[0]) < FAST_VALUE
    gradients, others = (torch.cat([grad.flatten() for grad in grads[1:]]) for grads in (values, expected))
    assert relative_error(gradients, others) < FAST_VALUE


def test_an_optimised_network_drops_what_the_ordinary_does(unet, expected):
    agree(passes(optimize(unet)), expected)
    assert relative_error(passes(unet, DRAW._replace(seed=1))[0], expected[0]) > 0.1


@pytest.mark.parametrize("optimised", [False, True], ids=["ordinary", "optimised"])
def test_a_checkpointed_network_drops_the_same_again(optimised, expected):
    """When the backward pass makes activations again, outside the block and after other draws."""
    model = small_unet(dropout=0.3, use_checkpoint=True)
    model = optimize(model) if optimised else model
    x = X.clone().requires_grad_()
    with paired(DRAW):
        value = model(x, T)
    with paired(DRAW._replace(seed=1)):
        grads = torch.autograd.grad(value.square().sum(), [x, *model.parameters()])
    agree([value.detach(), *grads], expected)


@pytest.mark.parametrize("optimised", [False, True], ids=["ordinary", "optimised"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_torchs_checkpoint_around_a_network(unet, expected, optimised, reentrant):
    """Outside of the draw it would drop others; inside, and without a draw in either pass, it is right."""
    model = optimize(unet) if optimised else unet
    x = X.clone().requires_grad_()

    def again():
        return checkpoint(model, x, T, use_reentrant=reentrant)

    def gradients(value):
        x.grad, _ = None, unet.zero_grad()
        value.square().sum().backward()
        return [value.detach(), x.grad, *(p.grad for p in unet.parameters())]

    with paired(DRAW):
        value = again()
    with pytest.raises(RuntimeError, match=r"without the draw that it dropped by: set use_checkpoint=True"):
        gradients(value)
    with paired(DRAW):
        agree(gradients(again()), expected)
    torch.manual_seed(0)
    values = gradients(again())
    torch.manual_seed(0)
    agree(values, gradients(model(x, T)))


@pytest.mark.parametrize("kind", ["counted", "ordinary", "optimised", "checkpointed"])
def test_under_compile(kind):
    """One graph, which another draw does not make anew."""
    unet = small_unet(dropout=0.3, channel_mult=[1], attention_resolutions=[], use_checkpoint=kind == "checkpointed")
    model = {"counted": Counted(), "optimised": optimize(unet)}.get(kind, unet)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager" if kind == "counted" else "eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for draw in (DRAW, DRAW._replace(seed=9), DRAW._replace(draw=6), ops.Draw(1, DRAW.index + 7)):
        with paired(draw):
            value, expected = compiled(X, T), model(X, T)
        assert relative_error(value, expected) < FAST_VALUE
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_whole_loss_under_compile():
    """Levels, noise, both masks and the distance in one graph."""
    model = Denoiser(Counted())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x, seed, index):
        return losses.consistency_loss(model, model, x, 100_000, draw=ops.Draw(seed, index))["loss"]

    for seed in range(2):
        given = X, torch.tensor(seed), DRAW.index
        value = loss(*given)
        expected = losses.consistency_loss(model, model, X, 100_000, draw=ops.Draw(*given[1:]))["loss"]
        assert value.max() < 1e-3
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


def test_in_a_captured_graph(unet, emulated):
    """A replay reads seed and index anew, and both calls in it drop the same."""
    model = Denoiser(optimize(unet))
    seed, index = torch.tensor(3), DRAW.index.clone()

    def step():
        # In place, GroupNorm on a CPU looks at variances.
        with torch.no_grad(), cmfast.backend("reference"):
            return losses.consistency_loss(model, model, X, 100_000, draw=ops.Draw(seed, index))["loss"]

    step()
    value, replay = emulated("cpu").capture(step, [])
    first = value.clone()
    seed.fill_(4)
    index.add_(1)
    replay()
    torch.testing.assert_close(value, step())
    assert not torch.allclose(value, first)


def test_no_generator_is_touched_where_all_is_counted(unet, monkeypatch):
    def forbidden(*_):
        raise AssertionError("the state of a generator was read")

    monkeypatch.setattr(torch, "get_rng_state", forbidden)
    for network in (unet, optimize(unet)):
        model = Denoiser(network)
        before = torch.initial_seed(), torch.default_generator.get_state()
        losses.consistency_loss(model, model, X, 18, draw=DRAW)
        assert torch.equal(torch.default_generator.get_state(), before[1])
    with pytest.raises(AssertionError, match="generator"):
        losses.consistency_loss(Denoiser(Plain()), Denoiser(Plain()), X, 18, draw=DRAW)


def test_which_models_count(unet):
    assert counts(unet) and counts(Denoiser(unet)) and counts(Denoiser(optimize(unet)))
    assert counts(torch.compile(Denoiser(unet), backend="eager"))
    assert not counts(ToyNetwork()) and not counts(Denoiser(Plain())) and not counts(lambda x, sigma: x)
