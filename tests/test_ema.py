"""Averages of a model: against updates by hand, targets, states that resume, copies, wrapped models."""

import copy

import pytest
import torch
from torch import nn

import cmfast
from cmfast.ema import Averages
from cmfast.rates import Given
from tests.host_reads import NoHostReads
from tests.toy import ToyNetwork


class Network(nn.Module):
    """Weights in channels_last, a buffer, and a weight that two modules share."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(5)
        self.tied = nn.Linear(2, 2)
        self.other = self.tied


def moved(model):
    """A step of training."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        for b in model.buffers():
            b.add_(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_updates_by_hand(backend):
    model = Network()
    averages = Averages(model, [0.9, "power:0.1", "warmup:0.99"])
    expected = [[p.detach().double() for p in model.parameters()] for _ in range(3)]
    assert averages.names == [name for name, _ in model.named_parameters()]
    for t in range(1, 8):
        moved(model)
        with cmfast.backend(backend), NoHostReads():
            averages.update_()
        rates = [0.9, (1 - 1 / t) ** (averages.schedules[1].gamma + 1), min(0.99, t / (t + 9))]
        for rate, group in zip(rates, expected):
            for average, p in zip(group, model.parameters()):
                average.mul_(rate).add_(p.detach().double(), alpha=1 - rate)
    assert averages.step.item() == 7
    for k in range(3):
        for average, high, p in zip(averages.tensors(k), expected[k], model.parameters(), strict=True):
            assert average.dtype == torch.float32 and average.stride() == p.stride()
            torch.testing.assert_close(average.double(), high, rtol=1e-5, atol=1e-6)


def test_float32_of_a_low_dtype_and_float64():
    model = nn.Linear(3, 3).bfloat16()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    averages = Averages(model, [0.9999])
    nn.init.constant_(model.weight, 2)
    for _ in range(100):
        averages.update_()
    # A bfloat16 average would have stood still.
    expected = torch.full((3, 3), 2 - 0.9999**100)
    torch.testing.assert_close(averages.tensors(0)[0], expected, rtol=1e-5, atol=0)
    assert Averages(model.double(), [0.9]).tensors(0)[0].dtype == torch.float64


def test_of_tensors_and_of_other_parameters():
    """Without a model; and of parameters that lie elsewhere than those they were made of."""
    a, b = torch.zeros(3), torch.zeros(2)
    averages = Averages([a, b], [0.5])
    assert averages.names == ["0", "1"]
    averages.update_([torch.ones(3), torch.ones(2)])
    assert averages.tensors(0)[1].tolist() == [0.5, 0.5]
    assert Averages(iter([("w", a)]), [0.5]).names == ["w"]
    with pytest.raises(ValueError, match="give the model"):
        averages.module(0)
    model = nn.Linear(2, 1)
    named = Averages(model.named_parameters(), [0.5])
    duplicate = named.module(0, model)
    assert duplicate is not model and torch.equal(duplicate.weight, model.weight)


def test_rates_are_not_read_on_the_host_and_keep_their_memory():
    rate = Given(0.5)
    averages = Averages([torch.zeros(2)], [rate, 0.9, "power:0.05"])
    first = averages.rates()
    rate.set_(0.75)
    with NoHostReads():
        second = averages.rates(torch.tensor(2))
    assert first.data_ptr() == second.data_ptr() and second.dtype == torch.float64
    assert second.tolist() == pytest.approx([0.75, 0.9, 0.5 ** (averages.schedules[2].gamma + 1)])


def test_a_target_shares_its_memory():
    """An update writes the target's weights in place, its version grows, and buffers follow the model."""
    model, target = Network(), Network()
    averages = Averages(model, [0.5, 0.9], targets={0: target})
    for p, q in zip(model.parameters(), target.parameters()):
        assert torch.equal(p, q)
    start, versions = copy.deepcopy(model), [q._version for q in target.parameters()]
    moved(model)
    averages.update_()
    for p, q, old, average, version in zip(
        model.parameters(), target.parameters(), start.parameters(), averages.tensors(0), versions
    ):
        torch.testing.assert_close(q, (p + old) / 2)
        assert average.data_ptr() == q.data_ptr() and q._version > version and isinstance(q, nn.Parameter)
    assert all(map(torch.equal, model.buffers(), target.buffers()))


def test_a_target_in_another_dtype_is_rounded_from_its_average():
    model, target = nn.Linear(3, 3), nn.Linear(3, 3).bfloat16()
    averages = Averages(model, [0.9], targets={0: target})
    for _ in range(3):
        moved(model)
        averages.update_()
        assert all(torch.equal(q, a.bfloat16()) for q, a in zip(target.parameters(), averages.tensors(0)))
    assert averages.tensors(0)[0].dtype == torch.float32


def test_one_rate_is_no_list():
    """Its letters are none either."""
    with pytest.raises(TypeError, match="rates must be a list, with a rate for each average, got 'power:0.05'"):
        Averages([torch.zeros(2)], "power:0.05")


def test_a_skipped_step_is_none():
    averages = Averages([torch.zeros(2)], [0.5])
    averages.advance(torch.ones(()))
    assert averages.step.item() == 0
    averages.advance(torch.zeros(()))
    assert averages.step.item() == 1


def test_resumes_exactly():
    """10 updates are 5, a state saved and loaded elsewhere, and 5 more, bit for bit; targets and given rates too."""
    rate = Given(0.9)
    model, target = Network(), Network()
    averages = Averages(model, [rate, "power:0.1"], targets={0: target})
    state = None
    for i in range(10):
        moved(model)
        rate.set_(0.9 + 0.005 * i)
        averages.update_()
        if i == 4:
            state, snapshot = copy.deepcopy(averages.state_dict()), copy.deepcopy(model)
            random = torch.get_rng_state()
    again_rate, again_target = Given(0.9), Network()
    again = Averages(snapshot, [again_rate, "power:0.1"], targets={0: again_target})
    again.load_state_dict(state)
    assert again_rate.value.item() == 0.9 + 0.005 * 4
    assert all(map(torch.equal, again_target.buffers(), snapshot.buffers()))
    torch.set_rng_state(random)
    for i in range(5, 10):
        moved(snapshot)
        again_rate.set_(0.9 + 0.005 * i)
        again.update_()
    for k in range(2):
        assert all(map(torch.equal, averages.tensors(k), again.tensors(k)))
    assert all(map(torch.equal, target.parameters(), again_target.parameters()))


def test_a_given_rate_within_a_warm_up():
    """Its value is saved and loaded as that of any other."""
    averages, again = (Averages([torch.zeros(2)], ["warmup:given:0.9", Given(0.8)]) for _ in range(2))
    averages.schedules[0].rate.set_(0.5)
    averages.step.fill_(1000)
    again.load_state_dict(averages.state_dict())
    assert again.rates().tolist() == averages.rates().tolist() == [0.5, 0.8]


def test_state_is_plain(tmp_path):
    averages = Averages(ToyNetwork(), [0.9, Given(0.5)])
    torch.save(averages.state_dict(), tmp_path / "state.pt")
    averages.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_copies_of_a_model():
    model = ToyNetwork()
    averages = Averages(model, [0.5])
    moved(model)
    averages.update_()
    duplicate = averages.module(0)
    assert type(duplicate) is ToyNetwork and not any(p.requires_grad for p in duplicate.parameters())
    assert all(map(torch.equal, duplicate.parameters(), averages.tensors(0)))
    other = ToyNetwork().half()
    averages.copy_to(other, 0)
    assert all(torch.equal(p, a.half()) for p, a in zip(other.parameters(), averages.tensors(0)))


def test_wrapped_models():
    """Names are those of the model inside, whatever is around it."""
    compiled = torch.compile(ToyNetwork(), backend="eager")
    averages = Averages(compiled, [0.5])
    assert averages.names == [name for name, _ in ToyNetwork().named_parameters()]
    averages.copy_to(ToyNetwork(), 0)
    inside = nn.Sequential(compiled)
    assert "0.conv1.weight" in Averages(inside, [0.5]).names


@pytest.mark.parametrize("compiled", ["the model's", "the target's", "both"])
def test_buffers_of_compiled_submodules(compiled):
    """Are followed and copied as others are."""
    model, target, other = Network(), Network(), Network()
    for network, name in ((model, "the model's"), (target, "the target's"), (other, "the target's")):
        if compiled in (name, "both"):
            network.norm = torch.compile(network.norm, backend="eager")
    averages = Averages(model, [0.5], targets={0: target})
    moved(model)
    averages.update_()
    averages.copy_to(other, 0)
    for network in (target, other):
        assert all(map(torch.equal, model.buffers(), network.buffers()))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Averages([], [0.5]), ValueError, "no parameters"),
        (lambda: Averages([torch.zeros(2).int()], [0.5]), TypeError, "'0' is torch.int32"),
        (lambda: Averages(ToyNetwork(), ["fast"]), ValueError, "rate 'fast'"),
        (lambda: Averages(ToyNetwork(), [0.5], targets={1: ToyNetwork()}), ValueError, "no average 1 .* there are 1"),
        (lambda: Averages(ToyNetwork(), [0.5], targets={0: nn.Linear(2, 2)}), ValueError, "missing conv1.bias, "),
        (lambda: Averages(ToyNetwork(7), [0.5], targets={0: ToyNetwork(8)}), ValueError, r"'emb.weight' is \[8, 8\]"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: Averages(ToyNetwork(), [0.9]), "rates .'0.9'., not .'0.5'."),
        (lambda: Averages(nn.Linear(2, 2), [0.5]), "average 0 of the state has other parameters: missing conv1"),
        (lambda: Averages(ToyNetwork(8), [0.5]), r"'emb.weight' of the state is \[8, 8\], the parameter \[7, 8\]"),
    ],
)
def test_states_that_do_not_fit(other, message):
    """Nothing is loaded of a state that does not fit."""
    averages = Averages(ToyNetwork(), [0.5])
    before = [a.clone() for a in averages.tensors(0)]
    with pytest.raises(ValueError, match=message):
        averages.load_state_dict(other().state_dict())
    assert all(map(torch.equal, averages.tensors(0), before))
