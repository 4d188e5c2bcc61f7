import pytest
import torch

from cmfast import Denoiser, Preconditioner, losses, samplers
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


def test_bad_constructor_arguments():
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
