"""The small modules of cmfast.compat.openai: nn, script_util, logger, and reading files in dist_util."""

import argparse
import copy
import csv
import io
import json
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cmfast import compat
from cmfast.checkpoint import CheckpointError
from cmfast.compat.openai import dist_util, fp16_util, karras_diffusion, logger, script_util, unet
from cmfast.compat.openai import nn as cm_nn


def test_layers_and_helpers():
    assert [type(cm_nn.conv_nd(d, 2, 3, 1)) for d in (1, 2, 3)] == [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    assert [type(cm_nn.avg_pool_nd(d, 2)) for d in (1, 2, 3)] == [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d]
    assert cm_nn.linear(2, 3).out_features == 3
    x = torch.randn(2, 64, 5)
    norm = cm_nn.normalization(64)
    assert norm.num_groups == 32
    torch.testing.assert_close(norm(x), nn.GroupNorm(32, 64)(x))
    assert cm_nn.GroupNorm32(16, 64)(x.half()).dtype == torch.float16
    torch.testing.assert_close(cm_nn.SiLU()(x), x * x.sigmoid())
    torch.testing.assert_close(cm_nn.mean_flat(x), x.mean((1, 2)))
    assert cm_nn.append_dims(x[:, 0, 0], 4).shape == (2, 1, 1, 1)
    assert cm_nn.append_zero(torch.ones(3)).tolist() == [1, 1, 1, 0]
    assert cm_nn.zero_module(nn.Linear(2, 2)).weight.abs().max() == 0
    layer = nn.Linear(2, 2)
    doubled = layer.weight.detach() * 2
    assert torch.equal(cm_nn.scale_module(layer, 2).weight, doubled)
    embedding = cm_nn.timestep_embedding(torch.tensor([0.0, 2.5]), 5, 100)
    angles = torch.tensor([2.5, 0.25])
    torch.testing.assert_close(embedding[1], torch.cat([angles.cos(), angles.sin(), torch.zeros(1)]))


def test_the_layers_of_a_network_are_these():
    network = unet.UNetModel(8, 3, 32, 3, 1, [2], channel_mult=(1, 2))
    assert sum(isinstance(m, cm_nn.GroupNorm32) for m in network.modules()) > 10
    for kind in (unet.ResBlock, unet.AttentionBlock, unet.Upsample, unet.Downsample):
        assert any(isinstance(m, kind) for m in network.modules())
    norm = cm_nn.GroupNorm32(4, 32, affine=False)
    x = torch.randn(2, 32, 5)
    torch.testing.assert_close(norm(x), nn.GroupNorm(4, 32, affine=False)(x))


def test_what_scripts_import_from_cm_unet():
    """What the original's module has by its own imports, so that blocks of a script's own can be made of it."""
    for home, names in (
        (cm_nn, "avg_pool_nd checkpoint conv_nd linear normalization timestep_embedding zero_module"),
        (fp16_util, "convert_module_to_f16 convert_module_to_f32"),
    ):
        for name in names.split():
            assert getattr(unet, name) is getattr(home, name) and name in unet.__all__


def test_blocks_take_the_originals_arguments():
    """In its order, with its attributes."""
    x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 64)
    block = unet.ResBlock(32, 64, 0.0, 64, True, True)
    assert block.skip_connection.kernel_size == (3, 3) and block.emb_layers[1].out_features == 128
    assert (block.channels, block.emb_channels, block.dropout, block.out_channels) == (32, 64, 0.0, 64)
    assert block.use_conv and block(x, emb).shape == (2, 64, 8, 8)
    plain = unet.ResBlock(32, 64, 0.0, 64, False, True)
    assert plain.skip_connection.kernel_size == (1, 1) and plain.use_scale_shift_norm

    attention = unet.AttentionBlock(32, 2, -1, True, attention_type="legacy", use_new_attention_order=True)
    assert attention.use_checkpoint and (attention.channels, attention.num_heads) == (32, 2)
    assert attention(x).shape == x.shape
    with pytest.raises(ValueError, match="encoder_channels=8: expected None"):
        unet.AttentionBlock(32, encoder_channels=8)

    for make, size in ((unet.Upsample, 16), (unet.Downsample, 4)):
        layer = make(32, True, 2, 64)
        assert (layer.channels, layer.out_channels, layer.use_conv, layer.dims) == (32, 64, True, 2)
        assert layer(x).shape == (2, 64, size, size) and make(32, False).out_channels == 32
    with pytest.raises(ValueError, match="out_channels=64 needs use_conv"):
        unet.Downsample(32, False, out_channels=64)


def test_attributes_of_a_network():
    arguments = {
        "num_res_blocks": 1, "attention_resolutions": (2,), "dropout": 0.1, "channel_mult": (1, 2),
        "conv_resample": False, "use_checkpoint": True, "num_heads": 2, "num_head_channels": -1,
    }  # fmt: skip
    network = unet.UNetModel(8, 3, 32, 3, **arguments)
    assert {name: getattr(network, name) for name in arguments} == arguments
    assert network.num_heads_upsample == 2
    network.dtype = torch.float16
    assert network.dtype == network.middle_block[0].in_layers[2].weight.dtype == torch.float16
    assert network.time_embed[0].weight.dtype == torch.float32


def test_casts_of_convolutions_and_noise_levels():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(1, 1))
    network.apply(fp16_util.convert_module_to_f16)
    assert [p.dtype for p in network.parameters()] == [torch.float16] * 2 + [torch.float32] * 2
    network.apply(fp16_util.convert_module_to_f32)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    sigmas = torch.rand(3)
    assert karras_diffusion.KarrasDenoiser().get_sigmas(sigmas) is sigmas


def test_update_ema():
    target, source = [torch.zeros(3), torch.zeros(2)], [torch.ones(3, requires_grad=True), torch.ones(2).half()]
    cm_nn.update_ema(target, source, rate=0.75)
    cm_nn.update_ema(target, source, rate=0.5)
    assert [t.tolist() for t in target] == [[0.625] * 3, [0.625] * 2]


def test_checkpoint_recomputes_and_gives_the_same_gradients():
    layer, calls = nn.Linear(3, 3), []

    def run(x):
        calls.append(1)
        return layer(x).tanh()

    gradients = []
    for flag in (False, True):
        x = torch.ones(2, 3, requires_grad=True)
        layer.zero_grad()
        cm_nn.checkpoint(run, (x,), layer.parameters(), flag).sum().backward()
        gradients.append((x.grad, layer.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert len(calls) == 3


def test_command_line_defaults():
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(parser, script_util.model_and_diffusion_defaults() | {"none": None})
    args = parser.parse_args(["--class_cond", "yes", "--sigma_max", "70", "--none", "text"])
    assert (args.class_cond, args.sigma_max, args.none, args.image_size) == (True, 70.0, "text", 64)
    assert script_util.args_to_dict(args, ["image_size"]) == {"image_size": 64}
    with pytest.raises(argparse.ArgumentTypeError, match="boolean value expected"):
        script_util.str2bool("maybe")
    assert [script_util.str2bool(v) for v in ("T", "0", True, "n")] == [True, False, True, False]
    assert script_util.cm_train_defaults()["loss_norm"] == "lpips"


def test_a_parsed_loss_norm_reaches_the_loss_in_the_arguments_asked_for():
    """In those of any function: a script's own takes no loss_norm."""
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(
        parser, script_util.model_and_diffusion_defaults() | script_util.cm_train_defaults()
    )
    for words, expected in (["--loss_norm", "l2"], "l2"), ([], "lpips"):
        keys = script_util.model_and_diffusion_defaults().keys()
        settings = script_util.args_to_dict(parser.parse_args(words), keys)
        assert settings.keys() == keys and settings["weight_schedule"] == "karras"
        settings = copy.deepcopy(settings) | {"channel_mult": "1,2"}
        with torch.device("meta"):
            _, diffusion = script_util.create_model_and_diffusion(**settings)
            _, other = script_util.create_model_and_diffusion(**settings, loss_norm="l1")
        assert (diffusion.loss_norm, other.loss_norm) == (expected, "l1")
        assert type(diffusion.weight_schedule) is str


@pytest.mark.parametrize(
    "size, mult",
    [(64, [1, 2, 3, 4]), (128, [1, 1, 2, 3, 4]), (256, [1, 1, 2, 2, 4, 4]), (512, [0.5, 1, 1, 2, 2, 4, 4])],
)
def test_create_model(size, mult):
    with torch.device("meta"):
        model = script_util.create_model(size, 64, 1, attention_resolutions="32,16", learn_sigma=True)
    assert isinstance(model, unet.UNetModel)
    assert model.config["channel_mult"] == mult
    assert model.config["attention_resolutions"] == [size // 32, size // 16]
    assert (model.config["out_channels"], model.config["num_classes"]) == (6, None)


def test_create_model_and_diffusion():
    settings = script_util.model_and_diffusion_defaults() | {
        "class_cond": True,
        "channel_mult": "1,2",
        "sigma_max": 70.0,
    }
    with torch.device("meta"):
        model, diffusion = script_util.create_model_and_diffusion(**settings, distillation=True)
    assert (model.config["channel_mult"], model.num_classes) == ([1, 2], script_util.NUM_CLASSES)
    assert vars(diffusion) == {
        "sigma_data": 0.5,
        "sigma_max": 70.0,
        "sigma_min": 0.002,
        "rho": 7.0,
        "weight_schedule": "karras",
        "distillation": True,
        "loss_norm": "lpips",
        "num_timesteps": 40,
    }


# logger


@pytest.fixture
def log_dir(tmp_path, monkeypatch):
    """A folder for logs, and no logger before or after."""
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    monkeypatch.setattr(logger.Logger, "DEFAULT", None)
    return tmp_path / "logs"


def test_log_files(log_dir, capsys):
    logger.configure(format_strs=["stdout", "log", "csv", "json"])
    assert logger.get_dir() == str(log_dir)
    logger.info("step", 1)
    logger.debug("not shown")
    logger.set_level(logger.WARN)
    logger.log("not shown")
    logger.error("shown")
    logger.logkv("loss", torch.tensor(0.5))
    logger.logkv_mean("grad", 1.0)
    logger.logkv_mean("grad", 4.0)
    logger.logkvs({"name": "a,b", "a" * 40: 1})
    assert logger.getkvs()["grad"] == 2.5
    written = logger.dumpkvs()
    assert (written["grad"], written["name"]) == (2.5, "a,b")
    assert not logger.getkvs()
    logger.logkv("late", 3)
    logger.dumpkvs()

    text = (log_dir / "log.txt").read_text()
    assert text == capsys.readouterr().out
    assert text.startswith(f"Logging to {log_dir}\nstep 1\nshown\n-----")
    assert "not shown" not in text
    assert "| grad                           | 2.5      |\n" in text
    assert f"| {'a' * 27}... | 1        |\n" in text
    with open(log_dir / "progress.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["grad"], first["name"], first["late"]) == ("2.5", "a,b", "")
    assert (second["grad"], second["late"]) == ("", "3")
    lines = [json.loads(line) for line in (log_dir / "progress.json").read_text().splitlines()]
    assert (lines[0]["loss"], lines[1]) == (0.5, {"late": 3})


def test_logger_of_another_rank(log_dir, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    logger.configure(log_suffix="-eval")
    logger.log("hello")
    assert [path.name for path in log_dir.iterdir()] == ["log-eval-rank002.txt"]
    assert not capsys.readouterr().out


def test_default_logger_and_scopes(log_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log")
    logger.log("made on first use")
    default = logger.get_current()
    with logger.scoped_configure(dir=str(tmp_path / "inner"), format_strs=["json"]):
        assert logger.get_dir() == str(tmp_path / "inner")
    assert logger.get_current() is default
    logger.configure(dir=str(tmp_path / "other"))
    logger.reset()
    assert logger.get_current() is default
    assert (log_dir / "log.txt").read_text() == f"Logging to {log_dir}\nmade on first use\nReset logger\n"


def test_default_log_dir(log_dir, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_LOGDIR")
    monkeypatch.setattr(logger.tempfile, "gettempdir", lambda: str(tmp_path))
    logger.configure(format_strs=[])
    (made,) = tmp_path.iterdir()
    assert made.name.startswith("openai-20")


def test_profiling_and_averages_without_ranks(log_dir):
    logger.configure(format_strs=[], comm=True)

    @logger.profile("work")
    def work():
        return 7

    assert work() == 7
    logger.logkv("text", "no number")
    with pytest.warns(UserWarning, match="text='no number'"):
        assert set(logger.dumpkvs()) == {"wait_work"}


def test_unknown_log_format(log_dir):
    with pytest.raises(ValueError, match="'xml'; known: stdout, log, csv, json, tensorboard"):
        logger.configure(format_strs=["xml"])


def test_tensorboard_is_optional(log_dir):
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install"):
            logger.configure(format_strs=["tensorboard"])
    else:
        logger.configure(format_strs=["tensorboard"])
        logger.logkv("loss", 1)
        logger.dumpkvs()
        assert list((log_dir / "tb").iterdir())


# dist_util


def test_load_state_dict(tmp_path):
    state = {"weight": torch.randn(3), "step": 4, "groups": [{"lr": 0.1}]}
    torch.save(state, tmp_path / "opt.pt")
    loaded = dist_util.load_state_dict(str(tmp_path / "opt.pt"), map_location="cpu")
    assert torch.equal(loaded.pop("weight"), state.pop("weight"))
    assert loaded == state


def test_load_state_dict_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="path of a checkpoint is empty: give a file, as in --model_path FILE"):
        dist_util.load_state_dict("")
    with pytest.raises(FileNotFoundError, match="^https://host.org/a.pt is an address, not a file: download it first"):
        dist_util.load_state_dict("https://host.org/a.pt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*missing.pt"):
        dist_util.load_state_dict(tmp_path / "missing.pt")
    torch.save({"weight": torch.randn(300)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:700])
    with pytest.raises(CheckpointError, match="cut.pt is no PyTorch file, or is cut short"):
        dist_util.load_state_dict(tmp_path / "cut.pt", map_location="cpu")
    torch.save(nn.Linear(1, 1), tmp_path / "object.pt")
    with pytest.raises(CheckpointError, match="pickled Python objects"):
        dist_util.load_state_dict(tmp_path / "object.pt", weights_only=False)


def test_setup_dist_refuses_mpiexec(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node 4"):
        dist_util.setup_dist()


def test_setup_dist_refuses_srun(monkeypatch):
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # A batch script's one process has these two.
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    dist_util.setup_dist()
    assert dist.get_world_size() == 1
    dist.destroy_process_group()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(RuntimeError, match="started by srun with 4 tasks.*torchrun by it, once on each machine"):
        dist_util.setup_dist()
    assert not dist.is_initialized()


def test_files_of_a_logger(tmp_path):
    table = io.StringIO()
    logger.HumanOutputFormat(table).writekvs({})
    assert table.getvalue() == ""
    lines = logger.CSVOutputFormat(str(tmp_path / "a.csv"))
    lines.writekvs({"a": 1})
    lines.close()
    assert lines.file.closed and (tmp_path / "a.csv").read_text() == "a\n1\n"


def test_packages_are_found_by_name():
    assert compat.__getattr__("openai") is sys.modules["cmfast.compat.openai"]
