"""An accelerated pipeline that is saved, copied, or made of components."""

import copy
import inspect
import json
import pickle

import pytest
import torch

import cmfast
from cmfast.compat.diffusers import CMStochasticIterativeScheduler, accelerate
from cmfast.tolerances import DIFFUSERS_VALUE
from tests.checkpoint_utils import same_bits
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


def test_the_pipeline_it_was_made_from_stays(tmp_path):
    plain = small_pipeline()
    scheduler, config = plain.scheduler, dict(plain.config)
    fast = accelerate(plain)
    assert type(plain) is diffusers.ConsistencyModelPipeline
    assert plain.scheduler is scheduler and dict(plain.config) == config and "_engine" not in vars(plain)
    assert isinstance(fast, diffusers.ConsistencyModelPipeline)
    assert fast.unet is plain.unet and fast.components.keys() == plain.components.keys()
    assert type(fast.scheduler) is CMStochasticIterativeScheduler
    parameters = [list(inspect.signature(type(p).__call__).parameters) for p in (plain, fast)]
    assert parameters[0] == parameters[1]


def test_saved_as_diffusers_own(tmp_path):
    """Whoever has only diffusers loads what was saved."""
    fast = accelerate(small_pipeline(num_class_embeds=10))
    fast.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert index["scheduler"] == ["diffusers", "CMStochasticIterativeScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(loaded) is diffusers.ConsistencyModelPipeline
    assert type(loaded.scheduler) is diffusers.CMStochasticIterativeScheduler
    assert same_bits(loaded.unet, fast.unet)


@pytest.mark.parametrize("kind", ["DDPM", "ConsistencyModel", "accelerated"])
def test_saved_with_an_optimised_network(kind, tmp_path):
    unet = cmfast.optimize(small_unet())
    if kind == "DDPM":
        pipeline = diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler(num_train_timesteps=10))
        pipeline.unet = unet
    else:
        pipeline = diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler())
        pipeline = accelerate(pipeline) if kind == "accelerated" else pipeline
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    for cls in (diffusers.DiffusionPipeline, getattr(diffusers, type(pipeline).__name__)):
        loaded = cls.from_pretrained(tmp_path, low_cpu_mem_usage=False)
        assert type(loaded.unet) is diffusers.UNet2DModel and same_bits(loaded.unet, unet)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"])
def test_copies(copied):
    fast = accelerate(small_pipeline(), dtype=torch.float32)
    fast()
    twin = copied(fast)
    assert type(twin) is type(fast) and twin.unet is not fast.unet
    assert twin._options == fast._options
    images = [call(pipeline, 2, output_type="pt")[0] for pipeline in (fast, twin)]
    assert torch.equal(*images)


@pytest.mark.parametrize("made", [accelerate, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_settings_of_register_to_config_are_kept(made):
    """diffusers counts what was left out of the constructor as a default for good."""
    plain = small_pipeline()
    plain.scheduler.register_to_config(s_noise=1.05, clip_denoised=False)
    fast = made(plain if made is accelerate else accelerate(plain))
    assert fast.scheduler.config == plain.scheduler.config
    assert fast.scheduler.sigmas is not plain.scheduler.sigmas
    expected, found = (call(p, 2, **STEPS["[22, 0]"], output_type="pt")[0] for p in (plain, fast))
    assert relative_error(found, expected) < DIFFUSERS_VALUE


def test_made_of_components(tmp_path):
    """The class of an accelerated pipeline makes others: what they were not told is as `accelerate` has it."""
    fast = accelerate(small_pipeline())
    fast.save_pretrained(tmp_path)
    expected = call(fast, 2, output_type="pt")[0]
    kind, loading = type(fast), {"scheduler": CMStochasticIterativeScheduler(), "low_cpu_mem_usage": False}
    for other in (kind(**fast.components), kind.from_pipe(fast), kind.from_pretrained(tmp_path, **loading)):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(call(other, 2, output_type="pt")[0], expected)
        assert type(other) is kind and other.explain()["network"][0] == "optimised"
