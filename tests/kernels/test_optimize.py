"""The optimised U-Net with its kernels: biases and residual connections that wait for the next normalisation."""

import collections
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cmfast
from cmfast.fast import optimize
from cmfast.ops import _dispatch
from cmfast.tolerances import FLOOR
from cmfast.unet import UNetModel
from tests.fast.networks import check, inputs, run
from tests.golden_utils import load, small_unet, unet_arguments

CASES = {
    "published": ({"num_classes": 5}, torch.float32),
    "published-bfloat16": ({"num_classes": 5}, torch.bfloat16),
    "added-bfloat16": ({"use_scale_shift_norm": False, "resblock_updown": False}, torch.bfloat16),
    "dropping, checkpointed": ({"dropout": 0.25, "use_checkpoint": True}, torch.float32),
}


def on(device, model, args):
    return model.to(device), tuple(x.to(device) for x in args)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, device):
    config, dtype = CASES[case]
    model = small_unet(**config).train("dropout" in config)
    model, args = on(device, model, inputs(model, 2, size=4))
    fast = optimize(model, None if dtype == torch.float32 else dtype)

    def measure(network, arguments, backend):
        with cmfast.backend(backend):
            torch.manual_seed(1)  # of the dropout masks
            return run(network, arguments)

    # The same pass without kernels is what is right: tests/fast compares it with the network as it was.
    wide = optimize(copy.deepcopy(model).double())
    exact_out, exact = measure(wide, (args[0].double(), *args[1:]), "reference")
    eager_out, eager = measure(fast, args, "reference")
    out, grads = measure(fast, args, "triton")
    check(out, eager_out, exact_out, FLOOR[dtype], exact_out.abs().max().item())
    scale = max(grad.abs().max().item() for grad in exact.values())
    for name, grad in grads.items():
        check(grad, eager[name], exact[name], FLOOR[dtype], scale, name)
    with cmfast.backend("triton"), torch.no_grad():
        torch.manual_seed(1)
        check(fast(*args), eager_out, exact_out, FLOOR[dtype], exact_out.abs().max().item())


def test_what_waits_is_added_once(device, monkeypatch):
    """No convolution adds its bias, and no addition of its own remains where a normalisation follows."""
    model = small_unet(num_classes=5).eval()
    model, args = on(device, model, inputs(model, 2, size=4))
    fast = optimize(model)
    biases, conv2d = [], torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda x, weight, bias, *rest: biases.append(bias) or conv2d(x, weight, bias, *rest),
    )
    with cmfast.backend("triton"), torch.no_grad():
        fast(*args)
    blocks = sum(type(module).__name__ == "ResBlock" for module in model.modules())
    assert sum(bias is None for bias in biases) == 2 * blocks and sum(bias is not None for bias in biases) == 2


#: What launches nothing on a GPU: views, room for results, and the reading of labels on a CPU.
SILENT = {
    *("view", "_unsafe_view", "permute", "transpose", "t", "slice", "select", "unsqueeze", "expand", "alias", "detach"),
    *("as_strided", "split", "split_with_sizes", "unbind", "empty", "empty_like", "new_empty", "zero_"),
    *("min", "max", "_local_scalar_dense"),
}


@pytest.mark.unguarded
def test_launches_of_the_published_network(monkeypatch):
    """The original launches 1,182 kernels for ImageNet-64, and a graph of dependent ones takes 2 us for each."""
    if not _dispatch.INTERPRETING:
        pytest.skip("launches are counted without a GPU: benchmarks/sampling.py asks the profiler of one")
    launches = []

    def launch(kernel, programs, out, *_, **__):
        launches.append(kernel.__name__)
        out.zero_()  # what lies in fresh memory may be denormal, and slow

    monkeypatch.setattr("cmfast.kernels.group_norm_tiles.launch", launch)

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name not in SILENT:
                launches.append(name)
            if "convolution" in name and args[2] is not None:
                launches.append("bias")
            return func(*args, **(kwargs or {}))

    _, meta = load("unet_imagenet64_2303")
    with torch.device("meta"):
        model = UNetModel(**unet_arguments(meta["config"]))
    # Nothing is looked at but what is launched: the weights may be anything.
    model = model.to_empty(device="cpu").eval().to(memory_format=torch.channels_last)
    for tensor in model.state_dict().values():
        tensor.zero_()
    fast = optimize(model)
    x, timesteps, y = torch.zeros(1, 3, 64, 64), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with cmfast.backend("triton"), torch.no_grad():
        fast(x, timesteps, y)
        launches.clear()
        with Launches():
            fast(x, timesteps, y)
    counts = collections.Counter(launches)
    assert counts["addmm"] == 2 + 1 + 2 * 22 + 19  # of the embedding, for all its users, of attention, of skips
    assert counts["bias"] == 2 and counts["clone"] == counts["contiguous"] == 0
    assert len(launches) <= 370, counts
