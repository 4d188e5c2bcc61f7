"""Wrapped models in every loss: distributed, compiled, or around a network that is."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cmfast import Denoiser
from cmfast.ema import Averages
from cmfast.objectives import OBJECTIVES
from cmfast.optim import Adam
from cmfast.ranks import Ranks
from cmfast.tolerances import STEP_VALUE
from tests.objective_utils import X, loss, make, models

each = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    file = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPED = {
    "ddp": lambda model: DistributedDataParallel(model),
    "ddp inside": lambda model: _around(model, DistributedDataParallel(model.network)),
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
    "compiled inside": lambda model: _around(model, torch.compile(model.network, backend="aot_eager")),
    "compiled in place": lambda model: (model.compile(backend="aot_eager"), model)[1],
    "ddp of compiled": lambda model: DistributedDataParallel(torch.compile(model, backend="aot_eager")),
}


def _around(model, network):
    return Denoiser(network, model.preconditioner)


@each
@pytest.mark.parametrize("how", ["ddp", "ddp inside"])
def test_distributed_models_are_accepted(name, how, process_group):
    check_wrapped(name, how)


@pytest.mark.parametrize("name", ["edm", "cd", "ect"])
@pytest.mark.parametrize("how", [how for how in WRAPPED if "compiled" in how])
def test_compiled_models_are_accepted(name, how, process_group):
    torch._dynamo.reset()
    check_wrapped(name, how)


def check_wrapped(name, how):
    """The same losses and gradients as of the model itself, which is called through its wrapper."""
    objective = make(name)
    x = X.float()
    model, target, teacher = models(objective)
    expected = loss(objective, model, x, target=target, teacher=teacher)["loss"]
    expected.mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wrapped = WRAPPED[how](model)
    synced = []
    ddp = wrapped if how.startswith("ddp") and how != "ddp inside" else getattr(wrapped, "network", None)
    if isinstance(ddp, DistributedDataParallel):
        ddp.register_comm_hook(None, lambda _, bucket: (synced.append(1), _done(bucket.buffer()))[1])
    value = loss(objective, wrapped, x, target=target, teacher=teacher)["loss"]
    torch.testing.assert_close(value, expected, rtol=STEP_VALUE, atol=STEP_VALUE)
    value.mean().backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=STEP_VALUE, atol=STEP_VALUE)
    assert bool(synced) == ("ddp" in how)
    if how == "compiled in place":
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def _done(value):
    future = torch.futures.Future()
    future.set_result(value)
    return future


def test_averages_of_a_distributed_model(process_group):
    model = torch.nn.Linear(2, 1)
    averages = Averages(DistributedDataParallel(model), [0.5])
    assert averages.names == ["weight", "bias"]
    averages.copy_to(DistributedDataParallel(model), 0)


def test_a_partial_gradient_is_refused(process_group):
    """Its parts are not yet added up over the ranks."""
    mesh = init_device_mesh("cpu", (1,))
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(RuntimeError, match="a gradient is a partial sum: reduce it before the step"):
        Adam([parameter], lr=0.1, max_norm=1.0).step()


def test_one_process_alone():
    assert Ranks().any(True)() and not Ranks().any(False)()
