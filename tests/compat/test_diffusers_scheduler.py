"""The scheduler beside diffusers' own: same calls, same numbers; and nothing is read on the host."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmfast.compat.diffusers import CMStochasticIterativeScheduler as Ours
from cmfast.compat.diffusers import steps
from cmfast.tolerances import DIFFUSERS_VALUE, FLOOR
from tests.compat.diffusers_utils import diffusers, small_unet
from tests.golden_utils import relative_error

Theirs = diffusers.CMStochasticIterativeScheduler
SCHEDULES = {
    "1": {"num_inference_steps": 1},
    "2": {"num_inference_steps": 2},
    "40": {"num_inference_steps": 40},
    "[22, 0]": {"timesteps": [22, 0]},
    "[39, 30, 3]": {"timesteps": [39, 30, 3]},
    "[17]": {"timesteps": [17]},
}


def toy(x, t):
    return torch.tanh(x.roll(1, 3) + 0.001 * t.to(x.dtype))


def run(scheduler, dtype=torch.float32, network=toy, begin=0, **schedule):
    """The samples after every step, from the same noise."""
    scheduler.set_timesteps(**schedule)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype) * scheduler.init_noise_sigma
    samples = []
    for t in scheduler.timesteps[begin:]:
        model_output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(model_output, t, x, generator=generator).prev_sample
        samples.append(x)
    return samples


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_same_numbers(schedule, dtype):
    ours, theirs = Ours(), Theirs()
    samples = run(ours, dtype, **schedule)
    for a, b in zip(samples, run(theirs, dtype, **schedule), strict=True):
        assert a.dtype == b.dtype == dtype
        assert relative_error(a, b) < DIFFUSERS_VALUE
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.step_index == theirs.step_index == len(samples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_step_by_step(dtype):
    """Each step from the same sample: over many, roundings add up differently."""
    ours, theirs = Ours(), Theirs()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[39, 30, 22, 10, 0])
    x = (80 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))).to(dtype)
    for i, t in enumerate(theirs.timesteps):
        model_input = theirs.scale_model_input(x, t)
        assert relative_error(ours.scale_model_input(x, t), model_input) < FLOOR[dtype]
        generators = [torch.Generator().manual_seed(i) for _ in range(2)]
        a, b = (s.step(toy(model_input, t), t, x, g).prev_sample for s, g in zip((ours, theirs), generators))
        assert a.dtype == b.dtype == dtype
        assert relative_error(a, b) < FLOOR[dtype]
        x = b


@pytest.mark.parametrize(
    "config",
    [
        {"s_noise": 1.01},
        {"clip_denoised": False, "sigma_data": 1.0},
        {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0, "num_train_timesteps": 20},
    ],
    ids=["s_noise", "no-clip", "levels"],
)
def test_same_numbers_of_other_configurations(config):
    schedule = {"timesteps": [15, 8, 0]}
    theirs = run(Theirs(**config), **schedule)
    for a, b in zip(run(Ours(**config), **schedule)[:-1], theirs, strict=False):
        assert relative_error(a, b) < DIFFUSERS_VALUE
    # Its last noise is scaled by the root of float32(sigma_min)^2 - sigma_min^2, which may be negative: then it is NaN.
    assert torch.isfinite(run(Ours(**config), **schedule)[-1]).all()


def test_the_fused_input_is_used_once_and_only_for_an_unchanged_sample():
    def steps(change):
        scheduler = Ours()
        scheduler.set_timesteps(timesteps=[22, 0])
        t, t2 = scheduler.timesteps
        x = 80 * torch.ones(1, 3, 4, 4)
        output = toy(scheduler.scale_model_input(x, t), t)
        x = change(scheduler.step(output, t, x, torch.Generator().manual_seed(0)).prev_sample)
        first, second = scheduler.scale_model_input(x, t2), scheduler.scale_model_input(x, t2)
        assert first is not second
        return x, first, second

    reference = Theirs()
    reference.set_timesteps(timesteps=[22, 0])
    reference.set_begin_index(1)
    for change in (lambda x: x, lambda x: x.mul_(0.5), lambda x: x + 1):
        x, *inputs = steps(change)
        expected = reference.scale_model_input(x, reference.timesteps[1])
        assert all(relative_error(value, expected) < DIFFUSERS_VALUE for value in inputs)


@pytest.mark.parametrize("index", [None, 3])
def test_the_input_of_another_level_than_the_next(index):
    """Of a loop that goes on at another level, or back to one."""
    inputs = []
    for kind in (Theirs, Ours):
        scheduler = kind()
        scheduler.set_timesteps(timesteps=[30, 20, 10, 0])
        t, x = scheduler.timesteps, 80 * torch.ones(1, 3, 4, 4)
        output = toy(scheduler.scale_model_input(x, t[0]), t[0])
        x = scheduler.step(output, t[0], x, torch.Generator().manual_seed(0)).prev_sample
        scheduler._step_index = index
        inputs.append(scheduler.scale_model_input(x, t[3]))
    assert relative_error(*inputs[::-1]) < DIFFUSERS_VALUE


def test_nothing_is_kept_after_the_last_step():
    scheduler = Ours()
    run(scheduler, timesteps=[22, 0])
    assert scheduler._next_input is None


def test_mixed_dtypes():
    for sample, output in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        results = []
        for scheduler in (Ours(), Theirs()):
            scheduler.set_timesteps(num_inference_steps=2)
            t = scheduler.timesteps[0]
            x = (80 * torch.ones(1, 3, 4, 4)).to(sample)
            scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.zeros(1, 3, 4, 4, dtype=output), t, x, torch.Generator().manual_seed(0))[0]
            results.append(x)
        assert results[0].dtype == results[1].dtype
        assert relative_error(*results) < FLOOR[torch.bfloat16]


def test_one_output_or_sample_for_all():
    """What is drawn has the shape of the output, whatever that of the sample."""
    for schedule in ({"num_inference_steps": 1}, {"timesteps": [22, 0]}):
        for shapes in (((1, 3, 4, 4), (2, 3, 4, 4)), ((2, 3, 4, 4), (1, 3, 4, 4))):
            output, x = (torch.linspace(-1, 1, shape[0] * 48).view(shape) for shape in shapes)
            results = []
            for scheduler in (Ours(), Theirs()):
                scheduler.set_timesteps(**schedule)
                t, generator = scheduler.timesteps[0], torch.Generator().manual_seed(0)
                scheduler.scale_model_input(x, t)
                results.append(scheduler.step(output, t, 80 * x, generator).prev_sample)
            assert results[0].shape == results[1].shape == (2, 3, 4, 4)
            assert relative_error(*results) < DIFFUSERS_VALUE


@pytest.mark.parametrize("cut, given", [(slice(1, None), 0), (slice(None, None, 2), 1), (slice(2), 3)], ids=str)
def test_a_timestep_beside_a_part_of_the_schedule(cut, given):
    """It lies in the same memory as the part, and is none of it."""
    scheduler = Ours()
    scheduler.set_timesteps(timesteps=[30, 22, 12, 0])
    timesteps = scheduler.timesteps
    scheduler.timesteps = timesteps[cut]
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == list(range(len(timesteps[cut])))
    with pytest.raises(IndexError, match="is not one of"):
        scheduler.index_for_timestep(timesteps[given])


def written(scheduler):
    scheduler.sigmas[1] = 1.0


@pytest.mark.parametrize(
    "change",
    [written, lambda s: s.sigmas.mul_(0.9), lambda s: s.register_to_config(s_noise=1.2)],
    ids=["item", "in-place", "s_noise"],
)
@pytest.mark.parametrize("after", ["input", "step"])
def test_levels_that_change_on_the_way(change, after):
    results = []
    for scheduler in (Ours(), Theirs()):
        scheduler.set_timesteps(timesteps=[30, 12, 0])
        x, generator = 80 * torch.ones(2, 3, 4, 4), torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps[:2]):
            model_input = scheduler.scale_model_input(x, t)
            if i == 0 and after == "input":
                change(scheduler)
            x = scheduler.step(toy(model_input, t), t, x, generator).prev_sample
            if i == 0 and after == "step":
                change(scheduler)
        results.append(x)
    assert relative_error(*results) < DIFFUSERS_VALUE


@pytest.mark.parametrize("levels", [[80.0, 20.0, 5.0, 2.0, 1.0], [80.0, 5.0, 0.002, 0.001, 0.0]], ids=str)
def test_levels_that_end_elsewhere(levels):
    """Noise is that of the level that comes next, whichever step it is."""
    results = []
    for scheduler in (Ours(), Theirs()):
        scheduler.set_timesteps(4)
        scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
        x, generator = 80 * torch.ones(2, 3, 4, 4), torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(toy(scheduler.scale_model_input(x, t), t), t, x, generator).prev_sample
        results.append(x)
    assert relative_error(*results) < DIFFUSERS_VALUE


def test_interface():
    scheduler = Ours()
    scheduler.set_timesteps(2)
    (x,) = scheduler.step(torch.zeros(2, 3, 4, 4), scheduler.timesteps[0], torch.zeros(2, 3, 4, 4), return_dict=False)
    assert x.shape == (2, 3, 4, 4)
    # One generator per sample.
    scheduler.set_timesteps(2)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 7)]
    x = scheduler.step(torch.zeros(2, 3, 4, 4), scheduler.timesteps[0], torch.zeros(2, 3, 4, 4), generators)
    assert torch.equal(x.prev_sample[0], x.prev_sample[1])
    assert len(scheduler) == 40
    assert isinstance(scheduler, Theirs)


@pytest.mark.parametrize("begin", [0, 1, 2])
def test_start_in_the_middle(begin):
    """As image-to-image does: the place is found from the timestep, or told by `set_begin_index`."""
    schedule = {"timesteps": [30, 12, 0]}
    expected = run(Theirs(), begin=begin, **schedule)
    found = run(Ours(), begin=begin, **schedule)
    assert len(found) == len(expected) == 3 - begin
    assert all(relative_error(a, b) < DIFFUSERS_VALUE for a, b in zip(found, expected, strict=True))

    ours, theirs = Ours(), Theirs()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**schedule)
        scheduler.set_begin_index(begin)
    x = torch.ones(1, 3, 4, 4)
    # What it is told counts, whatever timestep comes.
    a, b = (scheduler.scale_model_input(x, scheduler.timesteps[0]) for scheduler in (ours, theirs))
    assert relative_error(a, b) < DIFFUSERS_VALUE and ours.step_index == theirs.step_index == begin


def test_timesteps_by_value():
    scheduler = Ours()
    scheduler.set_timesteps(timesteps=[30, 12, 0])
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.index_for_timestep(t) == scheduler.index_for_timestep(t.clone()) == i
        assert scheduler.index_for_timestep(float(t)) == i
        assert scheduler.index_for_timestep(scheduler.timesteps[i : i + 1]) == i
    with pytest.raises(IndexError, match="timestep 3.0 is not one of scheduler.timesteps"):
        scheduler.step(torch.zeros(1), 3.0, torch.zeros(1))


def test_errors_are_those_of_diffusers():
    for make in (Ours, Theirs):
        scheduler = make()
        for bad in ({}, {"num_inference_steps": 41}, {"timesteps": [0, 22]}, {"timesteps": [40]}):
            with pytest.raises(ValueError):
                scheduler.set_timesteps(**bad)
        scheduler.set_timesteps(2)
        x = torch.zeros(1, 3, 4, 4)
        for bad in (0, torch.tensor(0)):
            with pytest.raises(ValueError, match="scheduler.timesteps"):
                scheduler.step(x, bad, x)
        for t in scheduler.timesteps:
            scheduler.step(x, t, x)
        with pytest.raises(IndexError):
            scheduler.step(x, t, x)


def test_what_is_no_tensor_is_named():
    scheduler, x = Ours(), torch.zeros(1, 3, 4, 4)
    scheduler.set_timesteps(2)
    with pytest.raises(TypeError, match="model_output must be a torch.Tensor, got NoneType"):
        scheduler.step(None, scheduler.timesteps[0], x)
    with pytest.raises(TypeError, match="sample must be a torch.Tensor, got ndarray"):
        scheduler.step(x, scheduler.timesteps[0], x.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_add_noise(dtype):
    x, noise = torch.randn(3, 3, 4, 4, dtype=dtype), torch.randn(3, 3, 4, 4, dtype=dtype)
    ours, theirs = Ours(), Theirs()

    def both(timesteps):
        a, b = (scheduler.add_noise(x, noise, timesteps) for scheduler in (ours, theirs))
        assert a.dtype == b.dtype
        assert relative_error(a, b) < (DIFFUSERS_VALUE if dtype == torch.float32 else FLOOR[dtype])

    both(ours.timesteps[[3, 0, 39]])
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[30, 12, 0])
    both(ours.timesteps[[1, 1, 2]])
    both(ours.timesteps[1:2])
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(2)
    both(ours.timesteps[:1].expand(3))
    for scheduler in (ours, theirs):
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        scheduler.step(x, scheduler.timesteps[0], x)
        scheduler._step_index = 1
    both(ours.timesteps[:1].expand(3))
    with pytest.raises(IndexError, match="are not all of"):
        Ours().add_noise(x, noise, torch.tensor([5.0] * 3))


@pytest.mark.parametrize("batches", [(1, 3, 3), (3, 1, 3), (1, 1, 3), (3, 3, 1), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float32"), ("float32", "float16")], ids=str)
def test_add_noise_broadcasts_and_promotes(batches, dtypes):
    x, noise = (torch.randn(b, 3, 4, 4, dtype=getattr(torch, dtype)) for b, dtype in zip(batches, dtypes))
    timesteps = Ours().timesteps[[3, 0, 39][: batches[2]]]
    a, b = (scheduler.add_noise(x, noise, timesteps) for scheduler in (Ours(), Theirs()))
    assert a.dtype == b.dtype and a.shape == b.shape
    assert relative_error(a, b) < (DIFFUSERS_VALUE if "float16" not in dtypes else FLOOR[torch.float16])


class NothingRead(TorchDispatchMode):
    """Fails on an operation that brings a value to the host, or whose output's shape depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"), name
        out = func(*args, **(kwargs or {}))
        moved = isinstance(out, torch.Tensor) and any(isinstance(a, torch.Tensor) and a.is_meta for a in args)
        assert not moved or out.is_meta, f"{name} brings a tensor to the host"
        return out


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_nothing_is_read_on_the_host(schedule):
    """On the meta device, whose tensors have no values: what reads one fails."""
    scheduler = Ours()
    scheduler.set_timesteps(**schedule, device="meta")
    x = torch.empty(2, 3, 8, 8, device="meta")
    steps = 0
    with NothingRead():
        for t in scheduler.timesteps:
            assert t.is_meta
            x = scheduler.step(toy(scheduler.scale_model_input(x, t), t), t, x).prev_sample
            steps += 1
        assert scheduler.add_noise(x, x, scheduler.timesteps[:1].expand(2)).is_meta
    assert scheduler.step_index == steps == len(scheduler.timesteps)

    # The guard itself: diffusers' scheduler looks for the timestep by its value.
    theirs = Theirs()
    theirs.set_timesteps(**schedule)
    theirs.timesteps = theirs.timesteps.to("meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NothingRead():
        theirs.scale_model_input(x, theirs.timesteps[0])


def test_in_a_pipeline():
    """A ConsistencyModelPipeline of diffusers around it gives the images that it gives around diffusers' own."""
    unet = small_unet(num_class_embeds=10)
    images = []
    for scheduler in (Theirs(), Ours()):
        pipeline = diffusers.ConsistencyModelPipeline(unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        images.append(pipeline(2, timesteps=[30, 12, 0], class_labels=[3, 4], output_type="pt").images)
    assert relative_error(*images) < DIFFUSERS_VALUE


def test_saved_as_diffusers_own(tmp_path):
    """Whoever has only diffusers loads what was saved with ours."""
    scheduler = Ours(sigma_max=40.0, s_noise=1.01)
    scheduler.save_pretrained(tmp_path / "scheduler")
    for make in (Ours, Theirs):
        loaded = make.from_pretrained(tmp_path / "scheduler")
        assert type(loaded) is make and (loaded.config.sigma_max, loaded.config.s_noise) == (40.0, 1.01)
    assert type(Ours.from_config(Theirs(rho=5.0).config)) is Ours
    assert Ours.from_config(Theirs(rho=5.0).config).config.rho == 5.0

    diffusers.ConsistencyModelPipeline(small_unet(), scheduler).save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "CMStochasticIterativeScheduler"]
    loaded = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "pipeline", low_cpu_mem_usage=False)
    assert type(loaded.scheduler) is Theirs and loaded.scheduler.config.sigma_max == 40.0
    loaded = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "pipeline", scheduler=scheduler, low_cpu_mem_usage=False
    )
    assert loaded.scheduler is scheduler


def edm(scheduler, sigma):
    """Scalings of a diffusion model, by the method that a scheduler has for them."""
    return scheduler.get_scalings(sigma)


def overridden(base):
    return type("Edm", (base,), {"get_scalings_for_boundary_condition": edm})(sigma_min=0.5)


def set_on_it(base):
    scheduler = base(sigma_min=0.5)
    scheduler.get_scalings_for_boundary_condition = edm.__get__(scheduler)
    return scheduler


@pytest.mark.parametrize("made", [overridden, set_on_it])
def test_scalings_of_its_own(made):
    schedule = {"timesteps": [30, 12, 0]}
    expected = run(made(Theirs), **schedule)
    for a, b in zip(run(made(Ours), **schedule), expected, strict=True):
        assert relative_error(a, b) < DIFFUSERS_VALUE
    assert relative_error(run(Theirs(sigma_min=0.5), **schedule)[-1], expected[-1]) > 0.01


class Own(Ours):
    """A user's."""


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_of_a_subclass_are_of_it(copied):
    scheduler = Own(rho=5.0)
    scheduler.register_to_config(s_noise=1.01)
    twin = copied(scheduler)
    assert type(twin) is Own and twin.config == scheduler.config


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_copies_go_on_where_they_are(copied):
    scheduler = Ours(sigma_max=40.0)
    scheduler.set_timesteps(timesteps=[30, 12, 0])
    x = torch.ones(1, 3, 4, 4)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(toy(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    twin = copied(scheduler)
    assert type(twin) is Ours and twin.config == scheduler.config and twin.step_index == 2
    t = scheduler.timesteps[2]
    results = [s.step(x, t, x, torch.Generator().manual_seed(0)).prev_sample for s in (scheduler, twin)]
    assert torch.equal(*results)


def test_timesteps_that_the_package_makes():
    """Each default has levels, also where the last of them is the grid's end, which ends `ts` anyway."""
    for count in (1, 2, 40):
        timesteps = steps.default_timesteps(count)
        sigmas = steps.sigmas_from_timesteps(timesteps)
        assert steps.timesteps_from_sigmas(sigmas) == timesteps
    assert (sigmas[0], sigmas[-1]) == (80.0, 0.002)
    with pytest.raises(ValueError, match="indices of the grid from 38 to 0"):
        steps.ts_from_timesteps(timesteps)


@pytest.mark.parametrize("made", [np.array, torch.tensor, tuple], ids=["array", "tensor", "tuple"])
def test_timesteps_of_any_kind(made):
    assert steps.ts_from_timesteps(made([22, 0])) == (0, 22, 39)
    assert steps.sigmas_from_timesteps(made([22, 0])) == steps.sigmas_from_timesteps([22, 0])
    with pytest.raises(ValueError, match="timesteps must be indices"):
        steps.ts_from_timesteps(made([22.5, 0]))
