"""Models of diffusers: pipelines, networks and their folders."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cmfast
from cmfast.checkpoint import CheckpointError, load
from cmfast.precondition import Preconditioner
from tests.checkpoint_utils import same_bits
from tests.golden_utils import relative_error

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipeline():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        num_class_embeds=10,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_min=0.01, sigma_max=40.0)
    return diffusers.ConsistencyModelPipeline(unet, scheduler)


@pytest.fixture
def pipeline_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_diffusers_objects(pipeline):
    model = load(pipeline)
    assert model.network.unet is pipeline.unet
    assert (model.sigma_min, model.sigma_max) == (0.01, 40.0)
    assert model.preconditioner == Preconditioner.consistency(sigma_min=0.01)
    assert (model.num_classes, model.image_shape) == (10, (3, 8, 8))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    timesteps = torch.tensor([40.0, -1500.0])
    assert torch.equal(model.network(x, timesteps, labels), pipeline.unet(x, timesteps, labels).sample)
    assert model(x, 3.0, labels).shape == x.shape

    alone = load(pipeline.unet, sigma_max=20.0)
    assert (alone.sigma_min, alone.sigma_max) == (0.002, 20.0)


def test_a_compiled_network_is_unwrapped(pipeline):
    compiled = torch.compile(pipeline.unet)
    assert load(compiled).network.unet is pipeline.unet
    pipe = type(pipeline)(**pipeline.components)
    pipe.unet = compiled
    assert load(pipe).network.unet is pipeline.unet and load(pipe).sigma_max == 40.0


def test_a_step_of_the_pipelines_scheduler(pipeline):
    """Our D is the one that the scheduler makes of the network's output."""
    model = load(pipeline)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(1)
    timestep = scheduler.timesteps[0]
    x, labels = scheduler.init_noise_sigma * torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    scaled = scheduler.scale_model_input(x, timestep)
    output = pipeline.unet(scaled, timestep, labels).sample
    expected = scheduler.step(output, timestep, x).prev_sample
    assert relative_error(model(x, float(scheduler.sigmas[0]), labels, clip=True), expected) < 1e-4


@pytest.mark.parametrize("folder", ["", "unet"], ids=["pipeline", "unet"])
def test_diffusers_folders(folder, pipeline, pipeline_folder):
    model = load(pipeline_folder / folder)
    assert same_bits(model.network.unet, pipeline.unet)
    assert model.sigma_max == (80.0 if folder else 40.0)
    assert load(pipeline_folder / folder, dtype=torch.bfloat16).network.unet.dtype == torch.bfloat16


pytest_form = None
@pytest.mark.parametrize("form", ["one file", "several files", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_diffusers_folders_of_another_dtype(dtype, form, tmp_path):
    """It is that of the file, as it is with other checkpoints."""
    options = {"several files": {"max_shard_size": "40KB"}, "pickle": {"safe_serialization": False}}.get(form, {})
    from tests.compat.diffusers_utils import small_unet

    small_unet(num_class_embeds=10).save_pretrained(tmp_path, variant="fp32")  # which nobody asks for
    unet = small_unet(num_class_embeds=10).to(dtype)
    unet.save_pretrained(tmp_path, **options)
    model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {dtype} and same_bits(model.network.unet, unet)
    assert {p.dtype for p in load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    for made in (model, load(tmp_path, convert=True)):
        assert cmfast.Sampler(made, 2).sample(2).shape == (2, 8, 8, 3)


def test_diffusers_folders_of_several_dtypes(pipeline, tmp_path):
    unet = copy.deepcopy(pipeline.unet)
    unet.conv_in.half()
    unet.save_pretrained(tmp_path)
    assert same_bits(load(tmp_path).network.unet, unet.float())


def test_diffusers_errors(pipeline, pipeline_folder, tmp_path):
    with pytest.raises(TypeError, match="dropout does not apply to a diffusers model"):
        load(pipeline, dropout=0.1)
    with pytest.raises(TypeError, match="cannot load a Identity: expected a path"):
        load(torch.nn.Identity())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither unet/config.json nor config.json$"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"config\.json; give .*model\.safetensors, the weights in it$"):
        load(tmp_path / "empty")

    scheduler = pipeline_folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"_class_name": "DDPMScheduler"}')
    with pytest.raises(CheckpointError, match="has a DDPMScheduler, expected the CMStochasticIterativeScheduler"):
        load(pipeline_folder)
    config = pipeline_folder / "unet" / "config.json"
    config.write_text('{"_class_name": "UNet1DModel"}')
    with pytest.raises(CheckpointError, match="holds a UNet1DModel, expected a UNet2DModel"):
        load(pipeline_folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(pipeline_folder)


def test_diffusers_weights_missing(pipeline_folder):
    for file in (pipeline_folder / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="could not be loaded by diffusers"):
        load(pipeline_folder)


def test_diffusers_is_imported_when_it_is_needed():
    code = """
import sys
import cmfast.compat.diffusers as compat
for name in ("UNet2DNetwork", "read_network", "unet_from_diffusers", "config_to_diffusers", "ts_from_timesteps"):
    getattr(compat, name)
assert "diffusers" not in sys.modules
for name in compat.__all__:
    assert name in dir(compat) and getattr(compat, name).__name__ == name
assert "diffusers" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'speed_up'; it has CMStochasticIterativeScheduler, UNet2D"):
        cmfast.compat.diffusers.speed_up  # noqa: B018


def test_without_diffusers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError, match="is no diffusers folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ImportError, match=r'pip install "cmfast\[diffusers\]"'):
        load(tmp_path)
    for module in ("scheduler", "pipeline"):
        monkeypatch.delitem(sys.modules, f"cmfast.compat.diffusers.{module}", raising=False)
    for name in ("accelerate", "CMStochasticIterativeScheduler"):
        monkeypatch.delitem(vars(cmfast.compat.diffusers), name, raising=False)
        with pytest.raises(ImportError, match=rf'{name} needs diffusers: pip install "cmfast\[diffusers\]"'):
            getattr(cmfast.compat.diffusers, name)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_weights_stored_in_another_dtype(storage, pipeline):
    """By diffusers' layerwise casting: the input comes in the dtype that it computes in."""
    unet = copy.deepcopy(pipeline.unet)
    model = load(unet)
    unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert model.input_dtype == torch.float32 and unet.conv_in.weight.dtype == storage
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    with torch.no_grad():
        found = model(x, 3.0, labels)
        for parameter in unet.parameters():
            parameter.data = parameter.float()
        assert relative_error(found, load(unet)(x, 3.0, labels)) < 0.05
    assert cmfast.Sampler(model, 2, steps=1).sample(2).dtype == torch.uint8
