"""What keeps the accelerated pipeline from its own loop or network: found, said, and the images are diffusers' own."""

import functools
import logging

import numpy as np
import pytest
import torch

from cmfast.compat.diffusers import accelerate
from cmfast.tolerances import DIFFUSERS_VALUE
from tests.compat.diffusers_utils import STEPS, both, call, diffusers, errors_at_most, small_pipeline  # noqa: F401
from tests.golden_utils import relative_error

attention_processor = pytest.importorskip("diffusers.models.attention_processor")


def test_a_forward_pass_of_the_networks_own():
    """Given to it after the first call, and taken away: it is called as diffusers' loop calls it."""
    plain = small_pipeline()
    fast = accelerate(plain)
    before, forward = call(fast, 2, output_type="pt")[0], plain.unet.forward

    def doubled(sample, timestep, class_labels=None, return_dict=True):
        assert return_dict is False
        return (2 * forward(sample, timestep, class_labels, return_dict)[0],)

    plain.unet.forward = doubled
    expected, found = (call(p, 2, output_type="pt")[0] for p in (plain, fast))
    assert relative_error(found, expected) < DIFFUSERS_VALUE < relative_error(before, expected)
    assert fast.explain()["network"] == ("as given", "the network has a forward pass of its own")
    del plain.unet.forward
    assert torch.equal(call(fast, 2, output_type="pt")[0], before)
    assert fast.explain()["network"][0] == "optimised"


def test_hooks_see_what_diffusers_hands_on():
    plain = small_pipeline()
    fast = accelerate(plain)
    with plain.unet.register_forward_hook(lambda module, args, output: (0.5 * output[0],)):
        expected, found = both(plain, 2, output_type="pt")
        again = call(fast, 2, output_type="pt")[0]
    assert relative_error(found, expected) < DIFFUSERS_VALUE and torch.equal(again, found)


@pytest.mark.parametrize("first", [True, False], ids=["before accelerate", "after"])
def test_hooks_on_parts_come_and_go(first):
    plain, calls = small_pipeline(), []
    fast = None if first else accelerate(plain)
    handle = plain.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    fast = fast or accelerate(plain)
    expected, *found = (call(p, 2, output_type="pt")[0] for p in (plain, fast))
    assert relative_error(*found, expected) < DIFFUSERS_VALUE and calls == [1, 1]
    assert fast.explain()["network"] == ("as given", "mid_block (UNetMidBlock2D) has a hook")
    handle.remove()
    assert fast.explain()["network"][0] == "optimised"
    assert relative_error(call(fast, 2, output_type="pt")[0], expected) < DIFFUSERS_VALUE and calls == [1, 1]


@pytest.mark.parametrize("first", [True, False], ids=["before accelerate", "after"])
def test_parts_of_another_kind_come_and_go(first):
    class Own(attention_processor.AttnProcessor2_0):
        pass

    plain = small_pipeline()
    fast, own = None if first else accelerate(plain), plain.unet.mid_block.attentions[0].processor
    plain.unet.mid_block.attentions[0].set_processor(Own())
    fast = fast or accelerate(plain)
    expected, found = (call(p, 2, output_type="pt")[0] for p in (plain, fast))
    assert relative_error(found, expected) < DIFFUSERS_VALUE
    path, why = fast.explain()["network"]
    assert path == "as given" and "mid_block.attentions.0.processor is a Own" in why
    plain.unet.mid_block.attentions[0].set_processor(own)
    assert fast.explain()["network"][0] == "optimised"
    assert relative_error(call(fast, 2, output_type="pt")[0], expected) < DIFFUSERS_VALUE


@pytest.mark.parametrize("part", ["postprocess_image", "numpy_to_pil"])
@pytest.mark.parametrize("where", ["subclass", "instance"])
def test_images_made_in_a_way_of_their_own(part, where):
    def mirrored(*args, **options):
        return [image.rotate(180) for image in getattr(diffusers.ConsistencyModelPipeline, part)(*args, **options)]

    plain = small_pipeline()
    if where == "subclass":
        value = staticmethod(mirrored) if part == "numpy_to_pil" else mirrored
        kind = type("Own", (diffusers.ConsistencyModelPipeline,), {part: value})
        plain = kind(**plain.components)
        plain.set_progress_bar_config(disable=True)
    else:
        setattr(plain, part, mirrored if part == "numpy_to_pil" else mirrored.__get__(plain))
    expected, found = both(plain, 2)
    assert np.abs(np.asarray(found[1], int) - np.asarray(expected[1], int)).max() <= 1


def test_what_is_in_the_way_is_said(caplog):
    """Then diffusers' own loop runs, and gives what it gives."""
    caplog.set_level(logging.INFO, "cmfast.compat.diffusers")
    plain = small_pipeline(dropout=0.5)
    fast = accelerate(plain)
    assert fast.explain()["loop"][0] == "eager"

    def check(message):
        assert fast.explain()["loop"][0] == "diffusers" and message in fast.explain()["loop"][1]
        expected, found = (call(p, 2, num_inference_steps=2, output_type="pt")[0] for p in (plain, fast))
        assert relative_error(found, expected) < DIFFUSERS_VALUE
        assert message in caplog.text

    plain.unet.train()
    check("a dropout layer in training mode")
    plain.unet.eval()
    plain.unet._hf_hook = object()
    check("hooks of accelerate or diffusers")
    del plain.unet._hf_hook
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.explain()["loop"][1].startswith("torch.autocast is on")
    fast.scheduler = plain.scheduler
    check("CMStochasticIterativeScheduler, not cmfast's")


@pytest.mark.parametrize("how", ["layers alone", "p by hand"])
def test_dropout_that_is_on(how):
    """As Monte Carlo dropout has it; or with a p that the configuration does not know."""
    plain = small_pipeline(dropout=0.5 if how == "layers alone" else 0.0)
    fast = accelerate(plain)
    before = call(fast, 2, output_type="pt")[0]
    for part in plain.unet.modules():
        if isinstance(part, torch.nn.Dropout):
            part.train().p = 0.5
    expected, found = (call(p, 2, output_type="pt")[0] for p in (plain, fast))
    assert relative_error(found, expected) < DIFFUSERS_VALUE < relative_error(before, expected)
    plain.unet.eval()
    assert torch.equal(call(fast, 2, output_type="pt")[0], before)


def shifted(function):
    """A method in the place of another, as scripts put it there."""

    @functools.wraps(function)
    def other(*args, **options):
        result = function(*args, **options)
        if hasattr(result, "prev_sample"):
            result.prev_sample = 0.5 * result.prev_sample
        return tuple(0.5 * part for part in result) if isinstance(result, tuple) else result

    return other


@pytest.mark.parametrize("method", ["step", "get_scalings_for_boundary_condition", "set_timesteps", "sigma_to_t"])
@pytest.mark.parametrize("where", ["before accelerate", "after", "diffusers' class"])
def test_replaced_methods_of_the_scheduler(method, where, monkeypatch):
    """On the scheduler, or on diffusers' class before its own scheduler would be taken for ours."""
    plain = small_pipeline()
    unchanged = call(plain, 2, num_inference_steps=2, output_type="pt")[0]
    fast = accelerate(plain) if where == "after" else None
    if where == "diffusers' class":
        monkeypatch.setattr(
            diffusers.CMStochasticIterativeScheduler,
            method,
            shifted(getattr(diffusers.CMStochasticIterativeScheduler, method)),
        )
    else:
        for pipeline in filter(None, (plain, fast)):
            setattr(pipeline.scheduler, method, shifted(getattr(pipeline.scheduler, method)))
    fast = fast or accelerate(plain)
    expected, found = (call(p, 2, num_inference_steps=2, output_type="pt")[0] for p in (plain, fast))
    assert relative_error(found, expected) < DIFFUSERS_VALUE
    if method in ("step", "get_scalings_for_boundary_condition"):
        assert relative_error(unchanged, expected) > 0.01
    assert fast.explain()["loop"] == ("diffusers", f"the scheduler's {method} was replaced")
    monkeypatch.undo()
    vars(fast.scheduler).pop(method, None)
    assert accelerate(fast).explain()["loop"][0] == "eager"


@pytest.mark.parametrize("callback", [None, lambda *_: None], ids=["whole", "callback"])
@pytest.mark.parametrize(
    "kind, labels",
    [
        ("timestep", torch.tensor([1.5, 2.5])),
        ("timestep", [11, 12]),
        ("identity", torch.linspace(-1, 1, 256).view(2, 128)),
    ],
    ids=["timestep-floats", "timestep-whole", "identity"],
)
def test_labels_that_are_no_classes(kind, labels, callback):
    plain = small_pipeline(class_embed_type=kind, num_class_embeds=10)
    expected, found = both(plain, 2, labels, num_inference_steps=2, output_type="pt", callback=callback)
    assert relative_error(found, expected) < DIFFUSERS_VALUE
    why = f"labels of class_embed_type={kind!r} are no classes"
    assert accelerate(plain).explain()["loop"] == ("diffusers", why)


@pytest.mark.parametrize("config", [{"sigma_min": 0.0}, {"sigma_max": 0.001}, {"sigma_data": 0.0}], ids=str)
def test_levels_that_a_denoiser_does_not_take(config):
    plain = small_pipeline(scheduler=diffusers.CMStochasticIterativeScheduler(**config))
    path, why = accelerate(plain).explain()["loop"]
    assert path == "diffusers" and why.startswith("cmfast has no such levels as the scheduler's: ")
    if "sigma_min" in config:
        for steps in ({}, STEPS["[30, 12, 5]"]):
            expected, found = both(plain, 2, output_type="pt", **steps)
            assert relative_error(found, expected) < DIFFUSERS_VALUE
