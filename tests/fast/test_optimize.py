"""Optimised networks: the numbers of the network they are made of, in fewer passes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cmfast
from cmfast.fast import optimize, refusal
from cmfast.tolerances import FAST_VALUE, FLOOR, GOLDEN_FULL_SIZE_FAST
from cmfast.unet import UNetModel
from tests.fast.networks import check, inputs, last, run
from tests.fast.test_changes import Lora
from tests.golden_utils import imagenet64_input, load, relative_error, small_unet, unet_arguments, unet_weights

pytestmark = pytest.mark.usefixtures("small_networks_count")

# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [8, 12], ids=str)
def test_outputs(model, dtype, size):
    args = inputs(model, size=size)
    exact = copy.deepcopy(model).double()(args[0].double(), *args[1:])
    cast = copy.deepcopy(model).to(dtype)
    fast = optimize(model, None if dtype == torch.float32 else dtype)
    with torch.no_grad():
        eager, out = (cast(*args), cast(*last(args))), fast(*args)
        assert out.dtype == torch.float32 and fast(args[0].to(dtype), *args[1:]).dtype == dtype
    check(out, eager, exact, FLOOR[dtype], exact.abs().max())
    # Weights in that dtype themselves are the same thing.
    with torch.no_grad():
        check(optimize(cast)(*args), eager, exact, FLOOR[dtype], exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(model, dtype):
    args = inputs(model)
    exact_out, exact = run(copy.deepcopy(model).double(), (args[0].double(), *args[1:]))
    cast = copy.deepcopy(model).to(dtype)
    (eager_out, eager), (eager_last, eager_grads) = run(cast, args), run(cast, last(args))
    fast_out, grads = run(optimize(copy.deepcopy(model), dtype), args)
    check(fast_out, (eager_out, eager_last), exact_out, FLOOR[dtype], exact_out.abs().max())
    assert grads.keys() == exact.keys()
    # A bias before a normalisation has no gradient but rounding: errors are measured by the largest gradient.
    scale = max(grad.abs().max().item() for grad in exact.values())
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        check(grad, (eager[name], eager_grads[name]), exact[name], FLOOR[dtype], scale, name)


def test_float64():
    model = small_unet().double()
    args = inputs(model, dtype=torch.float64)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            assert relative_error(optimize(model)(*args), model(*args)) < FLOOR[torch.float64] * 10


def test_autocast_is_the_dtype(model):
    args = inputs(model)
    # Under autocast nothing is kept packed, and packed convolutions add a residual before they round.
    fast, cast = optimize(model), optimize(model, torch.bfloat16, pack=False)
    with torch.no_grad():
        expected = cast(*args)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(*args), expected)
    _, grads = run(fast, args, autocast=True)
    _, expected_grads = run(cast, args)
    assert all(torch.equal(grad, expected_grads[name]) for name, grad in grads.items())


def test_gradient_of_the_input_alone(model):
    """As in guidance: weights are frozen, and the way back to x is open."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    args = inputs(model)
    results = []
    for network in (frozen, optimize(frozen)):
        x = args[0].clone().requires_grad_()
        network(x, *args[1:]).square().sum().backward()
        results.append(x.grad)
    assert relative_error(results[1], results[0]) < FAST_VALUE


def test_golden_imagenet64_full_size():
    tensors, meta = load("unet_imagenet64_2303")
    with torch.device("meta"):
        model = UNetModel(**unet_arguments(meta["config"]))
    fast = optimize(unet_weights(model.to_empty(device="cpu")).eval())
    with torch.no_grad():
        out = fast(imagenet64_input(), tensors["timesteps"], tensors["y"])
    assert relative_error(out, tensors["out"]) < GOLDEN_FULL_SIZE_FAST


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_one_compiled_graph(mode):
    model = small_unet(num_classes=5)
    args = inputs(model)
    compiled = torch.compile(optimize(model), backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(mode == "grad"):
        assert relative_error(compiled(*args), model(*args)) < FAST_VALUE


def test_compiling_sees_what_changed_before():
    """A part of another kind, and a copy that nobody has called yet."""
    model = small_unet().eval()
    args = inputs(model)
    fast = optimize(model)
    with torch.no_grad():
        fast(*args)  # the plan of then would serve again
    layers = model.middle_block[0].in_layers
    layers[2] = Lora(layers[2])
    with torch.no_grad():
        assert relative_error(torch.compile(fast, backend="aot_eager")(*args), model(*args)) < FAST_VALUE
        other = copy.deepcopy(optimize(small_unet().eval()))
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(*args), small_unet().eval()(*args)) < FAST_VALUE


def test_another_part_is_compiled_anew():
    """As of the ordinary network: a block of the same kind, and one that the fast pass does not know."""
    model = small_unet().eval()
    args = inputs(model)
    compiled = torch.compile(optimize(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(*args)
        block = model.middle_block[0] = copy.deepcopy(model.middle_block[0])
        block.in_layers[2].weight.mul_(3)
        assert relative_error(compiled(*args), model(*args)) < FAST_VALUE < relative_error(before, model(*args))
        block.in_layers[2] = Lora(block.in_layers[2])
        assert relative_error(compiled(*args), model(*args)) < FAST_VALUE


class Embedding(UNetModel):
    """A U-Net as users extend it."""

    def __init_subclass__(cls, *, name):
        """Of a table of models by name."""

    #: What checks saw.
    seen: list

    def embed(self, timesteps, y=None):
        return 3 * super().embed(1e-3 * timesteps, y)

    def _check_inputs(self, x, timesteps, y):
        self.seen.append(x.shape)
        super()._check_inputs(x, timesteps, y)

    def levels(self):
        return self.num_levels


@pytest.mark.parametrize("way", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), optimize])
def test_a_subclass_keeps_what_it_brings(way):
    model = unet_weights(Embedding(**small_unet().config)).eval()
    model.seen = []
    fast, args = way(optimize(model)), inputs(model)
    fast.seen.clear()
    with torch.no_grad():
        out, plain = fast(*args), small_unet().eval()(*args)
        assert relative_error(out, model(*args)) < FAST_VALUE < relative_error(plain, out)
    assert fast.refusal is None and isinstance(fast, Embedding) and fast.levels() == 2 and fast.seen
    assert type(fast).__name__ == "Embedding" and type(fast) is type(optimize(model))


def test_layout_of_the_input_does_not_matter(model):
    args = inputs(model)
    fast = optimize(model)
    with torch.no_grad():
        last = args[0].to(memory_format=torch.channels_last)
        assert torch.equal(fast(last, *args[1:]), fast(*args))


def test_empty_batch(model):
    args = inputs(model, 0)
    with torch.no_grad():
        assert optimize(model)(*args).shape == (0, 3, 8, 8)


# --- what it saves --------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_idle_passes():
    """No copies between layouts or dtypes but for x, one multiplication for all embeddings, in place what can be; and
    who looks on sees every convolution."""
    model = small_unet(num_classes=5).eval()
    args = inputs(model, size=16)
    fast = optimize(model)
    with torch.no_grad():
        fast(*args)
        with Calls() as calls:
            fast(*args)
    counts = {name: calls.names.count(name) for name in set(calls.names)}
    blocks = sum(type(m).__name__ == "ResBlock" for m in model.modules())
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    # One of them twice: PyTorch's own loses digits in channels_last where means are large.
    assert norms <= counts["native_group_norm"] <= norms + 2 and not counts.get("silu", 0) > 2
    assert counts.get("addmm", 0) == 3  # two of the time embedding, and one for all the blocks
    assert counts.get("clone", 0) <= 2 and counts.get("contiguous", 0) == 0
    assert counts.get("_convolution_pointwise_", 0) + counts["_convolution_pointwise"] >= 2 * blocks
    assert "convolution" not in counts and "mkldnn_convolution" not in counts


# --- errors ---------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(TypeError, match="cannot optimize a Linear: expected a UNetModel"):
        optimize(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="dims=1: the fast pass is for two dimensions"):
        optimize(small_unet(dims=1))
    with pytest.raises(TypeError, match="dtype must be float32"):
        optimize(small_unet(), torch.int64)

    class Other(UNetModel):
        def forward(self, x, timesteps, y=None):
            return x

    assert "the Other has a forward pass of its own" in refusal(unet_weights(Other(**small_unet().config)))
    model = small_unet()
    model.middle_block[0].forward = lambda x, emb: x
    assert "middle_block.0 has a forward pass of its own" in refusal(model)
    model = small_unet()
    model.out[2] = nn.Conv2d(32, 3, 3, padding=2, dilation=2)
    assert "expected a 3x3 convolution of stride 1 with a bias" in refusal(model)
    assert refusal(small_unet()) is None
    assert refusal(cmfast.Denoiser(small_unet())) is None
    assert "cannot optimize a function" in refusal(lambda x: x)


def test_bad_input_is_refused_as_ever(model):
    x, timesteps, *y = inputs(model)
    with pytest.raises(ValueError, match="x has shape"):
        optimize(model)(x[:, :2], timesteps, *y)
