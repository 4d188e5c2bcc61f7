"""The accelerated pipeline beside diffusers' own: same calls, same outputs."""

import logging

import numpy as np
import pytest
import torch

import cmfast
from cmfast.compat.diffusers import CMStochasticIterativeScheduler, accelerate
from cmfast.compat.diffusers import pipeline as module
from cmfast.fast import Refused
from cmfast.tolerances import DIFFUSERS_VALUE, FLOOR
from tests.compat.diffusers_utils import (  # noqa: F401  # a fixture
    STEPS,
    both,
    call,
    diffusers,
    errors_at_most,
    small_pipeline,
    small_unet,
)
from tests.golden_utils import relative_error
from tests.graph_emulator import emulated_graphs  # noqa: F401

attention_processor = pytest.importorskip("diffusers.models.attention_processor")
training_utils = pytest.importorskip("diffusers.training_utils")


@pytest.fixture(params=["as given", "optimised"])
def network(request, monkeypatch):
    """With the network made fast, and with one that cannot be."""
    if request.param == "as given":
        monkeypatch.setattr(module, "fast_network", lambda unet, dtype: (unet, "it is not wanted"))
    return request.param


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("num_classes", [None, 10], ids=["unconditional", "conditional"])
def test_same_images(steps, num_classes, network):
    plain = small_pipeline(num_class_embeds=num_classes)
    expected, found = both(plain, 3, output_type="pt", **steps)
    assert found.dtype == expected.dtype and found.shape == expected.shape == (3, 3, 8, 8)
    assert expected.std() > 0.1
    assert relative_error(found, expected) < DIFFUSERS_VALUE
    assert accelerate(plain).explain()["network"][0] == network


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_types(output_type, channels):
    plain = small_pipeline(in_channels=channels, out_channels=channels)
    expected, found = both(plain, 3, num_inference_steps=2, output_type=output_type)
    assert type(found) is type(expected)
    if output_type == "pil":
        assert [(a.mode, a.size) for a in found] == [(b.mode, b.size) for b in expected]
        # Rounding may fall to either side of a half.
        difference = np.stack([np.asarray(a, int) - np.asarray(b, int) for a, b in zip(found, expected)])
        assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
    else:
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.abs(np.asarray(found) - np.asarray(expected)).max() < DIFFUSERS_VALUE
    tuple_of_images = accelerate(plain)(output_type=output_type, return_dict=False)
    assert type(tuple_of_images) is tuple and len(tuple_of_images) == 1


@pytest.mark.parametrize(
    "labels, batch",
    [(7, 1), ([7], 1), ([1, 2, 3], 3), (torch.tensor([1, 2, 3]), 3), ([4], 3), (torch.tensor(4), 3)],
    ids=["int", "list-of-one", "list", "tensor", "one-for-all", "scalar-for-all"],
)
def test_labels(labels, batch):
    plain = small_pipeline(num_class_embeds=10)
    expected, found = both(plain, batch, labels, num_inference_steps=2, output_type="pt")
    assert relative_error(found, expected) < DIFFUSERS_VALUE
    other, _ = both(plain, batch, 0 if batch == 1 else [0, 0, 0], num_inference_steps=2, output_type="pt")
    assert relative_error(other, expected) > 0.01


def test_labels_of_an_unconditional_network_are_ignored():
    expected, found = both(small_pipeline(), 2, [1, 2], output_type="pt")
    assert relative_error(found, expected) < DIFFUSERS_VALUE


def test_latents_and_lists_of_generators():
    plain = small_pipeline()
    latents = torch.randn(2, 3, 8, 8)
    expected, found = both(plain, 2, latents=latents, **STEPS["[22, 0]"], output_type="pt")
    assert relative_error(found, expected) < DIFFUSERS_VALUE
    results = []
    for pipeline in (plain, accelerate(plain)):
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        results.append(pipeline(2, num_inference_steps=2, generator=generators, output_type="pt").images)
    assert relative_error(*results) < DIFFUSERS_VALUE
    # Without a generator it is torch's own.
    results = []
    for pipeline in (plain, accelerate(plain)):
        torch.manual_seed(3)
        results.append(pipeline(2, num_inference_steps=3, output_type="pt").images)
    assert relative_error(*results) < DIFFUSERS_VALUE


@pytest.mark.parametrize(
    "config",
    [{"s_noise": 1.05, "clip_denoised": False}, {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 1.0, "rho": 5.0}],
    ids=["noise", "levels"],
)
def test_settings_of_the_scheduler(config):
    plain = small_pipeline(scheduler=diffusers.CMStochasticIterativeScheduler(**config))
    # One step, and the first of two: at diffusers' last level is a rounding error, of which the root may be NaN.
    seen = []
    for pipeline in (plain, accelerate(plain)):
        torch.manual_seed(0)
        pipeline(2, **STEPS["[22, 0]"], output_type="pt", callback=lambda i, t, x: seen.append(x.clone()))
    assert relative_error(seen[2], seen[0]) < DIFFUSERS_VALUE
    expected, found = both(plain, 2, output_type="pt")
    assert relative_error(found, expected) < DIFFUSERS_VALUE
    fast = accelerate(plain)
    torch.manual_seed(0)
    whole = fast(2, **STEPS["[22, 0]"], output_type="pt").images
    assert relative_error(whole, (seen[3] / 2 + 0.5).clamp(0, 1)) < DIFFUSERS_VALUE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("steps", ["one", "[30, 12, 5]"])
def test_half_precision(steps, dtype, network, monkeypatch):
    """The error against float32, of the same weights and noise, is not twice that of diffusers in the same dtype."""
    plain = small_pipeline(num_class_embeds=10)
    plain.unet.to(dtype)
    options = {"class_labels": [1, 2, 3], "output_type": "pt", **STEPS[steps]}
    fast, found = accelerate(plain), None
    eager, found = (call(pipeline, 3, **options)[0] for pipeline in (plain, fast))
    assert found.dtype == eager.dtype == dtype
    assert call(fast, 3, **{**options, "output_type": "pil"})[0][0].size == (8, 8)
    assert np.isfinite(call(fast, 3, **{**options, "output_type": "np"})[0]).all()

    from diffusers.pipelines.consistency_models import pipeline_consistency_models
    from diffusers.schedulers import scheduling_consistency_models

    for other in (pipeline_consistency_models, scheduling_consistency_models):
        draw = other.randn_tensor
        monkeypatch.setattr(other, "randn_tensor", lambda *a, dtype, draw=draw, **k: draw(*a, dtype=half, **k).float())
    half = dtype
    plain.unet.float()
    expected = call(plain, 3, **options)[0]
    assert relative_error(found, expected) <= 2 * relative_error(eager, expected) + FLOOR[dtype]


def test_dtype_of_the_network():
    plain = small_pipeline(num_class_embeds=10)
    fast = accelerate(plain, dtype=torch.bfloat16)
    expected = call(plain, 3, output_type="pt", num_inference_steps=2)[0]
    found = call(fast, 3, output_type="pt", num_inference_steps=2)[0]
    assert found.dtype == torch.float32 and fast.unet.dtype == torch.float32
    assert 1e-5 < relative_error(found, expected) < 10 * FLOOR[torch.bfloat16]


def test_callbacks(network, caplog):
    plain = small_pipeline(num_class_embeds=10)
    fast = accelerate(plain)
    caplog.set_level(logging.INFO, "cmfast.compat.diffusers")
    for callback_steps, timesteps in ((1, [30, 12, 0]), (2, [30, 20, 12, 0])):
        seen = {plain: [], fast: []}
        for pipeline, calls in seen.items():
            found = call(
                pipeline,
                2,
                timesteps=timesteps,
                output_type="pt",
                callback=lambda i, t, x, calls=calls: calls.append((i, t, x.clone())),
                callback_steps=callback_steps,
            )
            seen[pipeline] = [*calls, found[0]]
        (*theirs, expected), (*ours, images) = seen.values()
        assert [i for i, *_ in ours] == [i for i, *_ in theirs] == list(range(0, len(timesteps), callback_steps))
        for (_, t, x), (_, t2, x2) in zip(theirs, ours, strict=True):
            assert torch.equal(t, t2) and t.dtype == t2.dtype
            assert relative_error(x2, x) < DIFFUSERS_VALUE
        assert relative_error(images, expected) < DIFFUSERS_VALUE
    assert "step by step, without a CUDA graph: there is a callback" in caplog.text


def test_callbacks_leave_generators_in_step():
    both(small_pipeline(), 2, **STEPS["[22, 0]"], output_type="pt", callback=lambda *_: None)


def test_a_callback_may_change_the_sample():
    plain = small_pipeline()
    expected, found = both(
        plain, 2, **STEPS["[22, 0]"], output_type="pt", callback=lambda i, t, x: x.mul_(0.5) if i == 0 else None
    )
    unchanged, _ = both(plain, 2, **STEPS["[22, 0]"], output_type="pt")
    assert relative_error(found, expected) < DIFFUSERS_VALUE < relative_error(unchanged, expected)


def test_a_callback_may_put_another_network_in(network):
    plain, first, other = small_pipeline(), small_unet(), small_unet(seed=5)
    images = []
    for pipeline in (plain, accelerate(plain)):
        pipeline.unet = first

        def swap(i, t, x, pipeline=pipeline):
            pipeline.unet = other

        images.append(call(pipeline, 2, **STEPS["[30, 12, 5]"], output_type="pt", callback=swap)[0])
    assert relative_error(*images[::-1]) < DIFFUSERS_VALUE
    unchanged = call(accelerate(small_pipeline()), 2, **STEPS["[30, 12, 5]"], output_type="pt")[0]
    assert relative_error(unchanged, images[0]) > 0.01


def test_the_scheduler_is_where_its_steps_end():
    fast = accelerate(small_pipeline())
    for steps, callback in ((1, None), (3, None), (3, lambda *_: None)):
        fast(num_inference_steps=steps, callback=callback)
        assert fast.scheduler.step_index == steps and fast.scheduler.is_scale_input_called


def test_changes_are_seen(network):
    """Weights, the network, the scheduler and the dtype, changed after the first call."""
    plain = small_pipeline()
    fast = accelerate(plain)

    def check():
        expected, found = (call(p, 2, **STEPS["[22, 0]"], output_type="pt")[0] for p in (plain, fast))
        assert found.dtype == expected.dtype and relative_error(found, expected) < DIFFUSERS_VALUE
        return expected

    results = [check()]
    with torch.no_grad():
        plain.unet.conv_in.weight.mul_(0.5)
    results.append(check())
    plain.unet.load_state_dict(small_unet(seed=5).state_dict())
    results.append(check())
    plain.unet = fast.unet = small_unet(seed=6)
    results.append(check())
    plain.scheduler = diffusers.CMStochasticIterativeScheduler(sigma_max=40.0, sigma_data=1.0)
    fast.scheduler = CMStochasticIterativeScheduler.from_config(plain.scheduler.config)
    results.append(check())
    plain.to(torch.float64)
    results.append(check().float())
    for a, b in zip(results[:-2], results[1:-1]):
        assert relative_error(b, a) > 1e-3


def test_settings_of_the_network_that_change(network):
    """More classes, and another input, both after the first call."""
    plain = small_pipeline(num_class_embeds=4)
    fast = accelerate(plain)
    before = call(fast, 2, [1, 2], output_type="pt")[0]
    plain.unet.class_embedding = torch.nn.Embedding(8, plain.unet.class_embedding.embedding_dim)
    for config, labels in (({"num_class_embeds": 8}, [6, 7]), ({"center_input_sample": True}, [1, 2])):
        plain.unet.register_to_config(**config)
        expected, found = (call(p, 2, labels, output_type="pt")[0] for p in (plain, fast))
        assert relative_error(found, expected) < DIFFUSERS_VALUE < relative_error(before, expected)
        before = expected


def test_averages_of_diffusers():
    """`EMAModel` writes them through `.data`, which leaves no trace: `refresh` sees them."""
    plain = small_pipeline()
    fast, averages = accelerate(plain), training_utils.EMAModel(plain.unet.parameters(), decay=0.5)
    for _ in range(3):
        with torch.no_grad():
            for parameter in plain.unet.parameters():
                parameter.mul_(1.1)
        averages.step(plain.unet.parameters())
    images = [call(fast, 2, output_type="pt")[0]]
    averages.store(plain.unet.parameters())
    for write in (averages.copy_to, averages.restore):
        write(plain.unet.parameters())
        fast.refresh()
        expected, found = (call(p, 2, output_type="pt")[0] for p in (plain, fast))
        assert relative_error(found, expected) < DIFFUSERS_VALUE < relative_error(images[-1], expected)
        images.append(found)
    assert relative_error(images[2], images[0]) < DIFFUSERS_VALUE


@pytest.fixture
def captured(emulated):
    """Emulated graphs of the reference: operations look at values on a CPU, which a capture forbids."""
    with cmfast.backend("reference"):
        yield emulated


def test_it_runs_as_one_graph(network, captured):
    """Captured once for each batch size and schedule; replayed with other noise, labels, and changed weights."""
    plain = small_pipeline(num_class_embeds=10)
    fast = accelerate(plain)
    assert fast.explain()["loop"][0] == "graph"

    def check(batch, seed, captures, output_type="pt", **options):
        before = captured.captures
        found, expected = (call(p, batch, seed=seed, output_type=output_type, **options)[0] for p in (fast, plain))
        assert captures is None or captured.captures - before == captures
        if output_type == "pt":
            assert relative_error(found, expected) < DIFFUSERS_VALUE
        return found

    steps = STEPS["[30, 12, 5]"]
    first = check(2, 0, 1, **steps)
    assert relative_error(check(2, 1, 0, **steps), first) > 0.01
    labelled = [check(2, 0, 0, class_labels=labels, **steps) for labels in ([1, 2], [1, 3], [1])]
    assert torch.equal(labelled[0][0], labelled[1][0]) and not torch.equal(labelled[0][1], labelled[1][1])
    with torch.no_grad():
        plain.unet.mid_block.resnets[0].conv1.weight.mul_(0.5)
        plain.unet.down_blocks[1].attentions[0].to_k.weight.mul_(3)
    # The convolution's weights packed for a CPU are replaced, then the graph is captured anew.
    assert relative_error(check(2, 0, 0 if network == "as given" else None, **steps), first) > 1e-3
    check(3, 0, 1, **steps)
    check(2, 0, 1)
    check(2, 0, 1, "pil")
    check(2, 0, 0, "pil", callback=lambda *_: None)
    assert captured.replays > 5


def merged(unet):
    """As PEFT merges: no version shows it."""
    unet.mid_block.attentions[0].to_q.weight.data += 0.3


def circular(unet):
    unet.conv_in.padding_mode = "circular"
    unet.mid_block.resnets[0].conv1.padding_mode = "circular"


@pytest.mark.parametrize("change", [merged, circular])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_refresh(change, graph, network, request):
    """Every schedule, and the loop with a callback, take what leaves no trace."""
    if graph:
        request.getfixturevalue("captured")
    plain, schedules = small_pipeline(), [STEPS["[22, 0]"], {}]
    fast = accelerate(plain)
    fast.refresh()
    before = [call(fast, 2, output_type="pt", **steps)[0] for steps in schedules]
    change(plain.unet)
    fast.refresh()
    for steps, old in zip(schedules, before, strict=True):
        expected = call(plain, 2, output_type="pt", **steps)[0]
        for options in (steps, {**steps, "callback": lambda *_: None}):
            assert relative_error(call(fast, 2, output_type="pt", **options)[0], expected) < DIFFUSERS_VALUE
        assert relative_error(old, expected) > 1e-3


def test_a_wrapped_network_is_optimised_and_its_changes_are_seen(captured):
    """`Sampler(load(pipeline))`: what is derived from weights that changed in place is made anew for the graph."""
    pipeline = small_pipeline()
    sampler = cmfast.Sampler(cmfast.load(pipeline), batch_size=2)
    assert sampler.explain()["network"][0] == "optimised"
    before = sampler.sample(2)
    with torch.no_grad():
        pipeline.unet.down_blocks[1].attentions[0].to_v.weight.mul_(-5)
        pipeline.unet.conv_out.weight.mul_(2)
    after = sampler.sample(2)
    assert captured.captures >= 1 and captured.replays >= 2
    fresh = cmfast.Sampler(cmfast.load(pipeline), batch_size=2, cuda_graph=False, optimize=False).sample(2)
    assert (after.int() - before.int()).abs().max() > 10
    assert (after.int() - fresh.int()).abs().max() <= 1


def test_few_schedules_are_kept():
    fast = accelerate(small_pipeline())
    for start in range(7):
        fast(timesteps=[start], output_type="pt")
    assert len(fast._engine._samplers) == module.SCHEDULES


def test_progress_bar(capsys):
    fast = accelerate(small_pipeline())
    fast.set_progress_bar_config(disable=False)
    fast(num_inference_steps=4)
    assert "4/4" in capsys.readouterr().err
    fast(num_inference_steps=3, callback=lambda *_: None)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, error",
    [
        ({"num_inference_steps": None}, ValueError),
        ({"num_inference_steps": 41}, ValueError),
        ({"timesteps": [0, 22]}, ValueError),
        ({"timesteps": [40]}, ValueError),
        ({"callback_steps": 0}, ValueError),
        ({"callback_steps": None}, ValueError),
        ({"latents": torch.zeros(1, 3, 4, 4)}, ValueError),
        ({"batch_size": 2, "class_labels": 1}, AssertionError),
        ({"batch_size": 2, "generator": [torch.Generator()] * 3}, ValueError),
        ({"output_type": "jpeg"}, ValueError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_are_those_of_diffusers(options, error):
    plain = small_pipeline(num_class_embeds=10)
    messages = []
    for pipeline in (plain, accelerate(plain)):
        with pytest.raises(error) as raised:
            pipeline(**options)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_what_cannot_be_accelerated():
    with pytest.raises(TypeError, match="expected a ConsistencyModelPipeline, got a DDPMPipeline"):
        accelerate(diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler()))
    with pytest.raises(TypeError, match="expected a ConsistencyModelPipeline, got a UNet2DModel"):
        accelerate(small_unet())

    class Own(diffusers.ConsistencyModelPipeline):
        def __call__(self):
            return None

    with pytest.raises(TypeError, match="Own has its own __call__"):
        accelerate(Own(small_unet(), diffusers.CMStochasticIterativeScheduler()))
    with pytest.raises(RuntimeError, match="cuda_graph=True cannot be had"):
        accelerate(small_pipeline(), cuda_graph=True)


def test_subclasses_keep_what_is_theirs():
    class Own(diffusers.ConsistencyModelPipeline):
        def prepare_latents(self, *, num_channels, height, **options):
            return 0.5 * super().prepare_latents(num_channels=num_channels, height=height, **options)

    own = Own(small_unet(), diffusers.CMStochasticIterativeScheduler())
    own.set_progress_bar_config(disable=True)
    expected, found = both(own, 2, output_type="pt")
    assert relative_error(found, expected) < DIFFUSERS_VALUE
    assert isinstance(accelerate(own), Own) and type(accelerate(accelerate(own))) is type(accelerate(own))


def test_a_dtype_needs_a_fast_network(monkeypatch):
    def refused(unet, dtype):
        raise Refused("of its shape")

    monkeypatch.setattr(module, "optimize", refused)
    with pytest.raises(ValueError, match="dtype=torch.bfloat16 needs a network that can be made fast: of its shape"):
        accelerate(small_pipeline(), dtype=torch.bfloat16)
    assert accelerate(small_pipeline()).explain()["network"] == ("as given", "of its shape")
