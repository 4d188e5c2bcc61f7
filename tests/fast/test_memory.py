"""Memory of an optimised network's derived weights and workspaces: when it goes, and who waits for it."""

import gc
import threading
import weakref

import pytest
import torch

import cmfast
from cmfast.fast import optimize, weights
from cmfast.native import winograd
from tests.fast.networks import inputs
from tests.fast.test_changes import changed_in_place
from tests.golden_utils import small_unet

pytestmark = pytest.mark.usefixtures("small_networks_count")


def test_memory_is_given_back_at_once():
    """Not when Python looks for objects that know each other, which may be after the next model was loaded."""
    model = cmfast.Denoiser(small_unet(model_channels=64), image_shape=(3, 8, 8)).eval()
    sampler = cmfast.Sampler(model, 2, dtype=torch.bfloat16)
    sampler.sample(2)
    kept = [entry.value for entry in sampler._runner._prepared.model.network._fast._weights._kept.values()]
    alive = [weakref.ref(x) for x in (*kept, *model.parameters())]
    assert len(kept) > 3
    gc.disable()
    try:
        del model, sampler, kept
        assert not [each for each in alive if each() is not None]
    finally:
        gc.enable()


@pytest.mark.skipif(winograd.refusal() is not None, reason=f"Winograd: {winograd.refusal()}")
def test_memory_of_convolutions_goes_with_the_thread_and_the_network(monkeypatch):
    """Each thread has its own; what one call leaves, the next uses."""
    alive, take = [], winograd.Workspace.take

    def watched(workspace, count):
        made = take(workspace, count)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(winograd.Workspace, "take", watched)
    model = cmfast.Denoiser(small_unet(model_channels=64), image_shape=(3, 8, 8)).eval()
    sampler = cmfast.Sampler(model, 2)
    gc.disable()
    try:
        thread = threading.Thread(target=sampler.sample, args=(2,))
        thread.start()
        thread.join()
        assert alive and not [each for each in alive if each() is not None]
        sampler.sample(2)
        kept = {id(each()) for each in alive if each() is not None}
        assert len(kept) == 1
        sampler.sample(2)
        assert {id(each()) for each in alive if each() is not None} == kept
        del sampler
        assert not [each for each in alive if each() is not None]
    finally:
        gc.enable()


def test_streams_wait_for_what_another_made(monkeypatch):
    """Threads have streams of their own: a derived weight is used on one when the other has made it."""
    waits, done, capturing = [], [], []

    class Event:
        def query(self):
            return bool(done)

    class Stream:
        def wait_event(self, event):
            waits.append(event)

    monkeypatch.setattr(weights, "_recorded", lambda x: Event())
    monkeypatch.setattr(weights, "_streams", lambda x: {1})
    monkeypatch.setattr(weights, "_current_stream", lambda x: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    model = small_unet().eval()
    fast, args = optimize(model, torch.bfloat16, pack=False), inputs(model)
    with torch.no_grad():
        fast(*args)
        kept = list(dict.fromkeys(waits))
        assert len(kept) == len(fast._fast._weights._kept) > 3
        waits.clear()
        capturing.append(True)
        fast(*args)
        assert not waits
        capturing.clear()
        assert fast.refresh() is False and set(waits) == set(kept)
        done.append(True)
        fast(*args)
        waits.clear()
        done.clear()
        fast(*args)
        assert not waits
        changed_in_place(model)
        fast(*args)
        assert waits and not set(waits) & set(kept)


def test_memory_is_kept_for_all_streams_that_read_it(monkeypatch):
    """Of itself, PyTorch gives away at once what was let go of, to the stream on which it was taken."""
    here, kept, capturing = [1], [], []
    monkeypatch.setattr(weights, "_streams", lambda x: set(here))
    monkeypatch.setattr(weights, "_current_stream", lambda x: here[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: kept.append((id(x), stream)))
    parameter = torch.ones(3)
    one = weights._Kept((parameter,), lambda p: p.half())

    def reads():
        kept.clear()
        for stream in (1, 2, 2, 1):
            here[0] = stream
            one.current()
        return kept

    capturing.append(True)
    assert reads() == []
    capturing.clear()
    assert reads() == [(id(one.value), 2)] and reads() == []
    parameter.mul_(2)
    assert reads() == []  # the same memory
    here[0], one._make = 2, lambda p: p.double()
    one.make_again()
    assert reads() == [(id(one.value), 1)]


def test_two_threads_that_make_a_weight_at_once_have_one():
    """A graph that one of them has captured reads its memory, and does not hold it."""
    parameter, made, others = torch.ones(3), weights.Weights(torch.bfloat16), []

    def get():
        return made._made("plain", (parameter,), make, False)

    def make(p):
        if not others:
            others.append(None)
            thread = threading.Thread(target=lambda: others.append(get()))
            thread.start()
            thread.join()
        return p.bfloat16()

    first = get()
    assert first is others[1] is get()
