"""Which path a call takes, and that it says why."""

import contextvars
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cmfast
from cmfast import ops
from cmfast.ops import _check, _dispatch

X, SIGMA = torch.randn(2, 3, 4, 4), torch.tensor([1.0, 2.0])


def test_backend_nests_and_ends():
    assert ops.current_backend() == "auto"
    with cmfast.backend("reference"):
        with cmfast.backend("triton"):
            assert ops.current_backend() == "triton"
        assert ops.current_backend() == "reference"
    with pytest.raises(ZeroDivisionError), cmfast.backend("reference"):
        raise ZeroDivisionError
    assert ops.current_backend() == "auto"


def test_backend_is_this_threads():
    seen = []
    with cmfast.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ops.current_backend()))
        thread.start()
        thread.join()
        contextvars.copy_context().run(lambda: seen.append(ops.current_backend()))
    assert seen == ["auto", "reference"]


def test_unknown_backend():
    with pytest.raises(ValueError, match="auto, triton, reference, got 'cuda'"), cmfast.backend("cuda"):
        pass


def test_an_operation_that_does_not_exist():
    with pytest.raises(ValueError, match="unknown operation 'denoised'; known: scale_input, .* draw_levels"):
        ops.explain("denoised")


def run_with(backend: str, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CMFAST_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_variable():
    code = "from cmfast import ops; print(ops.current_backend())"
    assert run_with("reference", code).stdout.split() == ["reference"]
    assert run_with("", code).stdout.split() == ["auto"]
    assert "CMFAST_BACKEND must be one of auto, triton, reference, got 'fast'" in run_with("fast", code).stderr


@pytest.mark.skipif(_dispatch.INTERPRETING, reason="Triton's interpreter is on, and runs on the CPU")
def test_triton_on_the_cpu_is_refused_with_the_reason():
    with cmfast.backend("triton"), pytest.raises(RuntimeError, match="denoise: backend 'triton' .* run on a GPU"):
        ops.denoise(X, X, SIGMA)
    with cmfast.backend("auto"):
        ops.denoise(X, X, SIGMA)


@pytest.mark.parametrize(
    "device, dtype, reason",
    [
        ("cpu", torch.float32, "on a GPU"),
        ("meta", torch.float32, "no kernels for meta"),
        ("cuda", torch.float64, "not torch.float64"),
    ],
)
def test_reasons(device, dtype, reason, monkeypatch):
    monkeypatch.setattr(_dispatch, "INTERPRETING", False)
    if device == "cuda":
        monkeypatch.setattr(_dispatch, "device_refusal", lambda device: None)
        device = "cpu"
    assert reason in _dispatch.refusal([torch.empty(2, device=device, dtype=dtype)], [])


def test_without_triton(monkeypatch):
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    assert "pip install triton" in _dispatch.refusal([X], [])


def test_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    _dispatch._old_gpu.cache_clear()
    assert "compute capability 7.0" in _dispatch._old_gpu(0)
    _dispatch._old_gpu.cache_clear()


GPU = torch.device("cuda", 1)


@pytest.fixture
def first_launch(monkeypatch):
    """Of a GPU for PyTorch: what it does can be set, and is counted."""
    import cmfast.kernels.images

    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: made.append(device) or torch.empty(shape))
    monkeypatch.setattr(_dispatch, "_launches", {})
    _dispatch._old_gpu.cache_clear()
    yield lambda does: monkeypatch.setattr(cmfast.kernels.images, "to_uint8_fwd", mock.Mock(side_effect=does)), made
    _dispatch._old_gpu.cache_clear()


@pytest.mark.skipif(_dispatch.INTERPRETING, reason="Triton's interpreter is on, and is for the CPU")
def test_where_nothing_can_be_launched_the_reference_serves(first_launch):
    """A warning says so once, and why."""
    does, made = first_launch
    does(RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable" + 300 * " etc"))
    with pytest.warns(UserWarning, match="a C compiler and Python's headers .RuntimeError: Failed to find"):
        reason = _dispatch.launch_refusal(GPU)
    assert len(reason) < 300 and made == [GPU]
    assert _dispatch.launch_refusal(GPU) == reason and len(made) == 1
    assert _dispatch.explain("denoise", GPU) == ("reference", reason)


@pytest.mark.skipif(_dispatch.INTERPRETING, reason="Triton's interpreter is on, and is for the CPU")
def test_a_gpu_that_is_full_is_no_reason(first_launch):
    """Not to launch on it for ever; what explains says so, and does not fail."""
    does, _ = first_launch
    does(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        _dispatch.launch_refusal(GPU)
    assert _dispatch.explain("denoise", GPU) == ("reference", "nothing can be launched now: CUDA out of memory")
    found = []
    does(lambda x, rounding: found.append(type(x)))
    with FakeTensorMode():  # whose tensors are no memory
        assert _dispatch.launch_refusal(GPU) is None
    assert found == [torch.Tensor]


def test_nothing_is_launched_for_a_trial_where_it_would_fail(first_launch, monkeypatch):
    """In a capture, whose graph it would be part of; in a transform, whose tensors are wrapped."""
    does, made = first_launch
    does(None)
    monkeypatch.setattr(_dispatch, "device_refusal", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _dispatch.launch_refusal(GPU) is None and not made
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = mock.Mock(spec=torch.Tensor, device=GPU, dtype=torch.float32)
    monkeypatch.setattr(_dispatch, "_subclass_refusal", lambda tensors, compiling: None)
    said = []
    torch.func.grad(lambda y: said.append(_dispatch.refusal([x], [])) or y.sum())(X)
    assert said == ["torch.func transforms go through the reference path"] and not made
    assert _dispatch.refusal([x], []) is None and made == [GPU]


def test_a_view_that_negates_takes_the_reference(monkeypatch):
    """A kernel would read what lies in memory, which has the other sign."""
    monkeypatch.setattr(_dispatch, "device_refusal", lambda device: None)
    assert "a view that negates" in _dispatch.refusal([torch._neg_view(X)], [])
    assert _dispatch.refusal([-X], []) is None


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_kernels_are_in_no_graph_of_operations(pre_dispatch, monkeypatch):
    """Whose outputs would be memory that nobody has written to."""
    monkeypatch.setattr(_dispatch, "device_refusal", lambda device: None)
    said = []
    make_fx(lambda x: said.append(_dispatch.refusal([X], [])) or x + 1, pre_dispatch=pre_dispatch)(X)
    torch.jit.trace(lambda x: said.append(_dispatch.refusal([X], [])) or x + 1, X, check_trace=False)
    assert len(said) == 2 and all("see PyTorch's operations alone" in each for each in said)
    assert _dispatch.refusal([X], []) is None


def test_dtypes_of_results_count(monkeypatch):
    monkeypatch.setattr(_dispatch, "device_refusal", lambda device: None)
    with cmfast.backend("triton"), pytest.raises(RuntimeError, match="scale_input: .* not torch.float64"):
        ops.scale_input(X, SIGMA, dtype=torch.float64)


def test_meta_and_fake_tensors_take_the_reference():
    meta = ops.denoise(X.to("meta"), X.to("meta"), SIGMA.to("meta"))
    assert meta.device.type == "meta" and meta.shape == X.shape
    with FakeTensorMode() as mode:
        x, sigma = mode.from_tensor(X), mode.from_tensor(SIGMA)
        noised, model_input, c_noise = ops.add_noise(x, x, sigma, dtype=torch.bfloat16)
    assert noised.shape == X.shape and model_input.dtype == torch.bfloat16 and c_noise.shape == (2,)


def test_transforms_and_forward_mode_take_the_reference():
    def loss(x):
        return ops.weighted_loss(x, torch.zeros_like(x), torch.ones(()), norm="l2").sum()

    expected = torch.func.grad(loss)(X)
    torch.testing.assert_close(expected, 2 * X / X[0].numel())
    value, tangent = torch.func.jvp(lambda x: ops.denoise(x, x, SIGMA), (X,), (torch.ones_like(X),))
    torch.testing.assert_close(tangent, ops.denoise(torch.ones_like(X), torch.ones_like(X), SIGMA))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        moved = torch.autograd.forward_ad.unpack_dual(ops.denoise(dual, dual, SIGMA)).tangent
    torch.testing.assert_close(moved, tangent)
    batched = torch.func.vmap(lambda x: ops.denoise(x, x, SIGMA))(torch.stack([X, X]))
    torch.testing.assert_close(batched[0], ops.denoise(X, X, SIGMA))


def test_values_that_one_thread_leaves_unread_are_read_by_others():
    def refused() -> bool:
        try:
            ops.scale_input(torch.ones(1, 2), torch.tensor(-1.0))
        except ValueError:
            return True
        return False

    with _check.unread(), ThreadPoolExecutor(1) as pool:
        assert not refused() and pool.submit(refused).result()
    assert refused()
