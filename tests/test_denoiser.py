import numpy as np
import pytest
import torch

from cmfast import Denoiser, Preconditioner, Sampler, losses, ops, samplers
from cmfast.denoiser import Evaluator
from tests.toy import ToyNetwork


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(num_classes=7))


X = torch.randn(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 6, 3])


def test_sigma_in_every_form(model):
    out = model(X, torch.tensor([1.5, 1.5, 1.5]), Y)
    assert torch.equal(model(X, torch.tensor(1.5), Y), out) and torch.equal(model(X, 1.5, Y), out)


def test_identity_at_the_boundary(model):
    assert torch.equal(model(X, 0.002, Y), X)
    model.preconditioner = Preconditioner.edm()
    assert not torch.equal(model(X, 0.002, Y), X)


@pytest.mark.parametrize(
    "sigma, message",
    [
        (torch.ones(3, 1), r"scalar or \[B\] with B = 3, got \[3, 1\]"),
        (torch.ones(2), r"got \[2\]"),
        (torch.tensor([1.0, -2.0, 1.0]), "got -2"),
        (torch.tensor([1.0, float("nan"), 1.0]), "not NaN"),
        (-1.0, "got -1"),
    ],
    ids=["2-d", "wrong batch", "negative", "nan", "negative number"],
)
def test_bad_sigma(model, sigma, message):
    with pytest.raises(ValueError, match=message):
        model(X, sigma, Y)


@pytest.mark.parametrize(
    "labels, message",
    [
        (None, "labels are missing"),
        (torch.tensor([0, 1, 7]), "from 0 to 6, got values from 0 to 7"),
        (torch.tensor([0, -1, 2]), "got values from -1"),
        (torch.tensor([0, 1]), r"got \[2\]"),
        (torch.tensor([0.0, 1.0, 2.0]), "float32"),
    ],
    ids=["missing", "too large", "negative", "wrong batch", "float"],
)
def test_bad_labels(model, labels, message):
    with pytest.raises(ValueError, match=message):
        model(X, 1.0, labels)
    with pytest.raises(ValueError, match=message):
        samplers.sample(model, X, labels=labels)
    with pytest.raises(ValueError, match=message):
        losses.denoising_loss(model, X, torch.ones(3), labels=labels)


def test_labels_for_an_unconditional_model():
    with pytest.raises(ValueError, match="unconditional"):
        Denoiser(lambda x, t: x)(X, 1.0, Y)


def test_low_precision_network_takes_its_own_dtype(model):
    half = Denoiser(ToyNetwork().to(torch.bfloat16))
    seen = []
    half.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    assert half(X, 1.0, Y).dtype == torch.float32 and seen == [torch.bfloat16]
    double = Denoiser(ToyNetwork().double())
    assert double(X.double(), 1.0, Y).dtype == torch.float64


def test_an_overridden_denoiser_is_called_as_a_whole(model):
    class Doubled(Denoiser):
        def forward(self, x, sigma, labels=None, *, clip=False):
            return 2 * super().forward(x, sigma, labels, clip=clip)

    doubled = Doubled(model.network)
    assert not Evaluator(doubled).fused and Evaluator(model).fused
    x = torch.randn(3, 3, 8, 6)
    one_step = samplers.sample_onestep(doubled, x, [80.0], labels=Y, clip_denoised=False)
    torch.testing.assert_close(one_step, doubled(x, 80.0, Y))


def test_one_graph(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, torch.ones(3), Y), model(X, torch.ones(3), Y))


def test_the_networks_time():
    sigma = torch.tensor([0.002, 1.0, 80.0])
    torch.testing.assert_close(Preconditioner.edm().c_noise(sigma), 250 * sigma.log())


def test_preconditioner_by_name():
    options = {"sigma_data": 0.7, "sigma_min": 0.01}
    assert Preconditioner.by_name("consistency", **options) == Preconditioner(0.7, 0.01)
    assert Preconditioner.by_name("edm", **options) == Preconditioner(0.7, 0.0)


@pytest.mark.parametrize("stated, count", [(0, None), (-1, None), (False, None), (np.int64(7), 7)], ids=str)
def test_classes_that_a_network_states(stated, count, model):
    """0 or -1 is how some say that they have none."""
    network = ToyNetwork()
    network.num_classes = stated
    found = Denoiser(network).num_classes
    assert found == count and type(found) is type(count)
    assert Sampler(network_of(stated), 2, image_shape=(3, 8, 6)).num_classes == count
    assert Denoiser(network, num_classes=np.int64(3)).num_classes == 3
    for wrong, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="num_classes must be"):
            Denoiser(network, num_classes=wrong)


def network_of(classes):
    """A function D(x, sigma) that says how many classes it has."""

    def denoise(x, sigma):
        return 0.1 * x

    denoise.num_classes = classes
    return denoise


def test_an_unconditional_network_that_states_no_classes():
    denoiser = Denoiser(network_of(-1), image_shape=(1, 4, 4))
    assert Sampler(denoiser, 2).sample(3).shape == (3, 4, 4, 1)


def test_bad_constructor_arguments():
    with pytest.raises(TypeError, match="num_classes of the network must be a whole number, got 2.5"):
        Denoiser(network_of(2.5))
    with pytest.raises(TypeError, match="image_shape must be a whole number"):
        Denoiser(ToyNetwork(), image_shape=(3, 8.5, 8))
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        Denoiser(ToyNetwork(), sigma_min=80.0, sigma_max=0.002)
    with pytest.raises(ValueError, match="sigma_data"):
        Preconditioner(sigma_data=0.0)
    with pytest.raises(ValueError, match="boundary"):
        Preconditioner(boundary=-1.0)
    with pytest.raises(ValueError, match="consistency, edm"):
        Preconditioner.by_name("vp")


def test_a_function_in_low_precision_keeps_the_state_in_float32():
    """D in bfloat16: the next input is the float32 state, not the state rounded to bfloat16."""
    seen = []

    def model(x, sigma):
        seen.append(x.dtype)
        return (0.1 * x).bfloat16()

    out = samplers.sample_euler(model, X, [3.0, 1.0, 0.5])
    assert seen == [torch.float32] * 2 and out.dtype == torch.float32


class Karras(Preconditioner):
    """Scalings of its own, and the time that EDM's networks are given."""

    def scalings(self, sigma):
        c_skip, c_out, c_in = super().scalings(sigma)
        return 0.5 * c_skip, 2 * c_out, c_in

    def c_noise(self, sigma):
        return sigma.log() / 4


class Timed(Preconditioner):
    """The same scalings, and another time."""

    def c_noise(self, sigma):
        return sigma.log() / 4


def by_hand(network, preconditioner):
    """D(x, sigma, labels) from what the preconditioner's methods say."""

    def denoise(x, sigma, labels=None):
        column = sigma.expand(len(x)).to(torch.float64).view(-1, 1, 1, 1)
        c_skip, c_out, c_in = (c.to(x.dtype) for c in preconditioner.scalings(column))
        own = () if labels is None else (labels,)
        output = network((c_in * x).to(x.dtype), preconditioner.c_noise(column).flatten().to(x.dtype), *own)
        return c_skip * x + c_out * output

    return denoise


class Exploding(Preconditioner):
    """Those of variance exploding, which are numbers mostly, and a time that says nothing."""

    def scalings(self, sigma):
        return 1, sigma, np.float32(1.5)

    def c_noise(self, sigma):
        return 0.25


def test_scalings_may_be_numbers(model):
    model.preconditioner = Exploding()
    x = X.double()
    for sigma in (torch.tensor([0.5, 80.0, 1.5]), torch.tensor(3.0), 3.0):
        output = model.network((1.5 * x).float(), torch.full((3,), 0.25), Y)
        wanted = x + torch.as_tensor(sigma).double().reshape(-1, 1, 1, 1) * output
        torch.testing.assert_close(model(x, sigma, Y), wanted)
    loss = losses.denoising_loss(model, X, torch.ones(3), noise=X.flip(0), labels=Y)["loss"]
    assert loss.shape == (3,) and loss.isfinite().all()
    samplers.sample(model, X, sampler="heun", sigmas=[80.0, 1.0], labels=Y)


@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_stored_in_float8(bias):
    """Such a network computes in the dtype of its others, or of its input."""

    class Stored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 3, 1, 1).to(torch.float8_e4m3fn), requires_grad=False)
            self.bias = None if bias is None else torch.nn.Parameter(torch.zeros(3, dtype=bias))

        def forward(self, x, t):
            return torch.nn.functional.conv2d(x, self.weight.to(x.dtype), self.bias)

    denoiser = Denoiser(Stored(), image_shape=(3, 8, 6))
    assert denoiser.input_dtype == bias and denoiser(X, 1.0).dtype == torch.float32
    assert Sampler(denoiser, 2).sample(2).shape == (2, 8, 6, 3)


@pytest.mark.parametrize("kind", [Preconditioner, Karras])
def test_vmap_over_a_network_of_one_layout(kind):
    torch.manual_seed(0)
    model = Denoiser(ToyNetwork(), kind())
    labels, sigma = Y[:, None], torch.tensor([0.5, 80.0, 1.5])
    wanted = model(X, sigma, Y)
    model.network.input_format = torch.channels_last
    mapped = torch.func.vmap(lambda *args: model(*args))
    torch._dynamo.reset()
    for denoise in (mapped, torch.compile(mapped, backend="eager", fullgraph=True)):
        torch.testing.assert_close(denoise(X[:, None], sigma[:, None], labels)[:, 0], wanted)


class Scaling(torch.nn.Module):
    """A network that scales its time in place."""

    def __init__(self, in_place):
        super().__init__()
        self.conv, self.in_place = torch.nn.Conv2d(3, 3, 3, padding=1), in_place

    def forward(self, x, t):
        t = t.mul_(0.1) if self.in_place else t * 0.1
        return self.conv(x).tanh() * t.cos()[:, None, None, None]


@pytest.mark.parametrize("kind", ["network", "of its own scalings", "hooked", "function"])
def test_a_network_may_write_into_its_time(kind):
    """It gets memory of its own, whatever else is told of the same level."""
    models = []
    for in_place in (True, False):
        torch.manual_seed(0)
        network = Scaling(in_place)
        denoiser = Denoiser(network, Timed() if kind == "of its own scalings" else None)
        if kind == "hooked":
            denoiser.register_forward_hook(lambda *_: None)
        models.append(network if kind == "function" else denoiser)
    draw = ops.Draw(0, torch.arange(3))
    for use in (
        lambda model: samplers.sample(model, X, sampler="heun", sigmas=[80.0, 5.0, 1.0]),
        lambda model: losses.denoising_loss(model, X, torch.tensor(0.5), noise=X.flip(0))["loss"],
        lambda model: losses.consistency_loss(model, model, X, 18, teacher_model=model, draw=draw)["loss"],
    ):
        assert torch.equal(use(models[0]), use(models[1]))
    if kind != "function":
        for sigma in (torch.tensor([0.5, 80.0, 1.5]), 3.0):
            assert torch.equal(models[0](X, sigma), models[1](X, sigma))


class Doubling(torch.nn.Module):
    """A network that doubles its input in place."""

    def __init__(self, in_place):
        super().__init__()
        self.conv, self.in_place = torch.nn.Conv2d(3, 3, 3, padding=1), in_place

    def forward(self, x, t):
        x = x.mul_(2) if self.in_place else x * 2
        return self.conv(x.tanh())


@pytest.mark.parametrize("kind", ["network", "function"])
@pytest.mark.parametrize("solver", ["heun", "euler", "progressive", "none"])
def test_a_network_may_write_into_its_input(solver, kind):
    """Which is no other's, though several are asked about one point."""
    found, draw = [], ops.Draw(0, torch.arange(3))
    for in_place in (True, False):
        torch.manual_seed(0)
        networks = [Doubling(in_place) for _ in range(3)]
        model, target, teacher = networks if kind == "function" else map(Denoiser, networks)
        if solver == "progressive":
            terms = losses.progressive_distillation_loss(model, teacher, X, 8, draw=draw)
        else:
            others = {} if solver == "none" else {"solver": solver, "teacher_model": teacher}
            terms = losses.consistency_loss(model, target, X, 18, draw=draw, **others)
        found.append(terms["loss"])
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [Karras, Timed])
class TestOverriddenPreconditioner:
    """Methods of a subclass are what a Denoiser computes with, at every step and in every loss."""

    def test_denoises_by_them(self, kind, model):
        model.preconditioner = kind(0.7)
        assert not Evaluator(model, labels=Y).fused
        wanted = by_hand(model.network, model.preconditioner)
        for sigma in (torch.tensor([0.5, 80.0, 1.5]), torch.tensor(3.0)):
            torch.testing.assert_close(model(X, sigma, Y), wanted(X, sigma, Y))
        clipped = model(9 * X, 0.5, Y, clip=True)
        assert torch.equal(clipped, model(9 * X, 0.5, Y).clamp(-1, 1)) and clipped.abs().max() == 1
        with pytest.raises(ValueError, match="noise levels and must be 0 or more"):
            model(X, -1.0, Y)
        with pytest.raises(ValueError, match="labels are missing"):
            model(X, 1.0)

    @pytest.mark.parametrize("sampler", samplers.SAMPLERS)
    def test_sampling(self, kind, sampler, model):
        model.preconditioner = kind()
        wanted = by_hand(model.network, model.preconditioner)
        sigmas = [80.0] if sampler == "onestep" else [80.0, 5.0, 1.0]
        options = {"noise_fn": torch.ones_like} if sampler not in ("euler", "progdist") else {}
        options |= {"sampler": sampler, "sigmas": sigmas, "labels": Y}
        torch.testing.assert_close(samplers.sample(model, X, **options), samplers.sample(wanted, X, **options))

    def test_losses(self, kind, model):
        model.preconditioner = kind()
        wanted = by_hand(model.network, model.preconditioner)
        teacher = Denoiser(model.network, Preconditioner.edm())
        draw = ops.Draw(0, torch.arange(3))
        for loss in (
            lambda model: losses.denoising_loss(model, X, torch.tensor([0.5, 1.0, 7.0]), noise=X.flip(0), labels=Y),
            lambda model: losses.consistency_loss(model, model, X, 18, draw=draw, labels=Y),
            lambda model: losses.consistency_loss(model, model, X, 18, teacher_model=teacher, draw=draw, labels=Y),
            lambda model: losses.consistency_loss(teacher, teacher, X, 18, teacher_model=model, draw=draw, labels=Y),
            lambda model: losses.easy_consistency_loss(model, X, 0, draw=draw, labels=Y),
            lambda model: losses.progressive_distillation_loss(model, teacher, X, 4, draw=draw, labels=Y),
        ):
            torch.testing.assert_close(loss(model)["loss"], loss(wanted)["loss"], rtol=1e-4, atol=1e-5)

    def test_a_sampler_says_so(self, kind, model):
        model.preconditioner = kind()
        sampler = Sampler(model, 3, image_shape=(3, 8, 6), steps=2)
        assert f"{kind.__name__} overrides" in sampler.explain()["network"][1]
        wanted = samplers.sample(by_hand(model.network, model.preconditioner), X, sigmas=sampler.sigmas, labels=Y,
                                 noise_fn=torch.ones_like)  # fmt: skip
        torch.testing.assert_close(sampler.generate(X, Y, noise_fn=torch.ones_like), wanted)

    def test_half_networks_take_their_own_dtype(self, kind):
        half, seen = Denoiser(ToyNetwork().bfloat16(), kind()), []
        half.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
        assert half(X, 1.0, Y).dtype == torch.float32 and half(X.double(), 1.0, Y).dtype == torch.float64
        assert seen == [torch.bfloat16] * 2

    def test_one_graph(self, kind, model):
        model.preconditioner = kind()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X, torch.ones(3), Y), model(X, torch.ones(3), Y))
