"""Calls that are refused, each by a sentence that names the argument, what came and what was expected."""

import errno
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cmfast
from cmfast import (
    checkpoint,
    cli,
    curricula,
    editing,
    ema,
    exact,
    losses,
    objectives,
    ops,
    quality,
    recipes,
    reference,
    samplers,
    schedules,
    untrusted,
)
from cmfast.checkpoint import CheckpointError
from cmfast.compat.diffusers import network, steps
from cmfast.compat.openai import image_datasets
from cmfast.data import decode, npz, open_data
from cmfast.ranks import Ranks
from cmfast.training import Trainer, TrainOptions, config, lock, state
from cmfast.unet_config import from_shapes
from tests.training import toys

X = torch.zeros(2, 3, 4, 4)
LABELS, INDEX = torch.tensor([0, 1]), torch.arange(2)
ONE = torch.ones(2)
DRAW = ops.Draw(0, torch.arange(2))
TABLE = torch.linspace(1, 2, 4)


def d(x, sigma, labels=None):
    return x


def tenth(x, t, labels=None):
    return 0.1 * x


def sampler(**options):
    return cmfast.Sampler(cmfast.Denoiser(tenth, num_classes=3), 2, image_shape=(3, 4, 4), **options)


def sampler_of(output):
    return cmfast.Sampler(cmfast.Denoiser(lambda x, t: output(sample=x), image_shape=(3, 4, 4)), 2)


def consistency(num_scales=18, **options):
    return losses.consistency_loss(D, D, X, num_scales, **options)


def ect(stage=1, **options):
    return losses.easy_consistency_loss(D, X, stage, draw=DRAW, **options)


def pictures(height, width):
    return SimpleNamespace(image_shape=(3, height, width), num_classes=None)


def grid(**change):
    return ops.Grid(TABLE, 1, None)._replace(**change)


D = cmfast.Denoiser(tenth)
AVERAGES = ema.Averages(torch.nn.Linear(2, 1), [0.5])

#: What is wrong: a call, and what its message says.
CASES = {
    "timesteps, none": (lambda: steps.default_timesteps(0), "num_inference_steps must be from 1 to 40, got 0"),
    "timesteps that rise": (lambda: steps.ts_from_timesteps([0, 22]), r"as in \[22, 0\]; got \[0, 22\]"),
    "ts that fall": (lambda: steps.timesteps_from_ts([39, 0]), "ts must increase from 0 or more to 39, as in"),
    "a level off the grid": (lambda: steps.timesteps_from_sigmas([80, 5]), "sigma 5 is not one of the 40 levels"),
    "intervals of a curriculum": (lambda: curricula.karras_grid(1), "num_scales must be 2 or more, got 1"),
    "a mask of another size": (
        lambda: editing.edit(d, X, X, [1.0], mask=torch.ones(5)),
        r"mask does not broadcast to the transformed image: \[5\] against \[2, 3, 4, 4\]",
    ),
    "means of a mixture": (lambda: exact.MixtureDenoiser(ONE), r"means must be \[K, C, H, W\] .* got \[2\]"),
    "std of a mixture": (lambda: exact.MixtureDenoiser(X, -1.0), "std must be 0 or more, got -1.0"),
    "weights of a mixture": (lambda: exact.MixtureDenoiser(X, weights=torch.ones(3)), r"weights must be \[2\]"),
    "std of levels": (lambda: ops.draw_levels(DRAW, ops.LogNormal(0.0, -1.0)),
                      r"levels.std must be a number of 0 or more, got -1.0"),
    "a mean of levels": (lambda: ops.draw_levels(DRAW, ops.LogNormal(torch.nan)),
                         "levels.mean must be a finite number, got nan"),
    "a factor": (lambda: ops.draw_levels(DRAW, ops.LogNormal(below=ops.Below(torch.inf))),
                 "levels.below.factor must be a finite number, got inf"),
    "a table of one level": (lambda: ops.draw_levels(DRAW, grid(table=ONE[:1])), "levels.table must be .stride N . 1"),
    "thresholds": (lambda: ops.draw_levels(DRAW, grid(thresholds=ONE)), r"thresholds must be int64 \[2\], got torch"),
    "a batch without channels": (
        lambda: ops.denoise_to_uint8(ONE, ONE, ONE),
        r"x_t must be a batch \[B, C, ...\] of 2 or more dimensions, got \[2\]",
    ),
    "no interval": (
        lambda: losses.progressive_distillation_loss(d, d, X, 0, draw=DRAW), "num_scales must be 1 or more, got 0"
    ),
    "an unknown sampler": (lambda: samplers.sample(d, X, sampler="none"), "unknown sampler 'none'; known: "),
    "pixels of an earlier level": (
        lambda: samplers.sample_multistep(d, X, [1.0], pixels="trunc", end_sigma=0.5), "leave end_sigma out"
    ),
    "a network's field": (
        lambda: recipes._model({"network": {"width": 3}}, None, pictures(8, 8), None), "network: .*width"
    ),
    "an odd width": (
        lambda: recipes._model({"network": "tiny"}, None, pictures(8, 7), None),
        "images are 8 x 7, and this U-Net takes multiples of 4: image_size",
    ),
    "a setting of a group": (lambda: recipes.complete({"recipe": "ct", "paths": {"dat": ""}}), "paths knows no dat; "),
    "weights of another network": (
        lambda: from_shapes({"input_blocks.0.0.weight": (64, 3, 3, 3), "time_embed.0.weight": (256, 64)}),
        "these are not the weights of this U-Net: 0 output blocks",
    ),
    "more blocks than tensors": (
        lambda: untrusted.check_network({"num_res_blocks": 50, "channel_mult": [1, 2]}, 60),
        "num_res_blocks and channel_mult make 102 blocks, and there are 60 tensors",
    ),
    "digits without classes": (
        lambda: quality.made_by(SimpleNamespace(sample=lambda *a, **k: X.byte(), labels=lambda *a, **k: None), 2),
        "quality is measured of class-conditional models",
    ),
    "pairs that do not come closer": (lambda: ect(q=0.5), "q must be above 1, .* got 0.5"),
    "pairs as close at each stage": (lambda: ect(q=1.0), "q must be above 1, .* got 1.0"),
    "a q of 0": (lambda: ect(q=0.0), "q must be positive, got 0.0"),
    "levels that rise": (lambda: ect(k=-3.0), "k must be a number of 0 or more, got -3.0"),
    "a negative b": (lambda: ect(b=-1.0), "b must be a number of 0 or more, got -1.0"),
    "a negative stage": (lambda: ect(-1), "stage must be 0 or more, got -1"),
    "q of an objective": (lambda: objectives.EasyConsistencyTuning(q=0.5), "q must be above 1"),
    "mean of an objective": (lambda: objectives.EDM(mean="a"), "mean must be a finite number, got 'a'"),
    "a class in letters": (lambda: sampler().labels(2, classes="12"), "classes must be whole numbers, got '12'"),
    "no class": (lambda: sampler().labels(2, classes=[None, 1]), r"classes must be whole numbers, got \[None, 1\]"),
    "classes of a generator": (
        lambda: sampler().labels(2, classes=(i for i in (0, 1))), "classes must be whole numbers"
    ),
    "a class of 71 bits": (lambda: sampler().labels(2, classes=2**70), "classes must be whole numbers, got 118059"),
    "a curriculum that falls": (lambda: curricula.doubling_stage(0, 10, 10, 5), "end_scales must be 10 or more, got 5"),
    "a step before the first": (lambda: curricula.doubling_stage(-1, 10, 10, 50), "step must be 0 or more, got -1"),
    "no steps": (
        lambda: schedules.ema_and_scales("fixed", 0.9, "progressive", 2, 150, 0, 0), "total_steps must be pos"
    ),
    "no steps of a stage": (
        lambda: schedules.ema_and_scales("fixed", 0.9, "progdist", 2, 150, 1, 0), "distill_steps_per_iter must be pos"
    ),
    "an unknown weighting": (lambda: consistency(weighting="foo"), "unknown weighting 'foo'; known: "),
    "a sigma_data of 0": (lambda: consistency(sigma_data=0.0), "^sigma_data must be positive, got 0.0"),
    "images of 32 x 32 from a signal": (
        lambda: losses.distance(X[0], X[0], ONE[0], loss_norm="l2-32"),
        r"loss_norm='l2-32' is for images \[B, C, H, W\], got \[3, 4, 4\]: take l1, l2 or huber",
    ),
    "classes of a function": (
        lambda: cmfast.Sampler(d, 2, image_shape=(3, 4, 4)).sample(2, classes=1),
        "leave them out; a function D.x, sigma, labels. says by an attribute num_classes how many it has",
    ),
    "a rate that is none, before there is a model": (
        lambda: TrainOptions(1, 1, 1e-4, averages=("0.9", "foo")), "rate 'foo': could not convert"
    ),
    "no state of averages": (
        lambda: AVERAGES.load_state_dict(torch.nn.Linear(2, 1).state_dict()), "no state of Averages: it has no rates, "
    ),
}  # fmt: skip
TYPES = {
    "a stage between stages": (lambda: ect(1.5), "stage must be a whole number, got 1.5"),
    "indices between levels": (
        lambda: consistency(indices=torch.tensor([3.7, 3.7])), "indices must be whole numbers, got torch.float32"
    ),
    "indices that are answers": (
        lambda: consistency(indices=LABELS > 0), "indices must be whole numbers, got torch.bool"
    ),
    "scales between scales": (lambda: consistency(2.5), "num_scales must be a whole number, got 2.5"),
    "scales in letters": (lambda: consistency("18"), "num_scales must be a whole number, got '18'"),
    "intervals": (
        lambda: losses.progressive_distillation_loss(D, D, X, None), "num_scales must be a whole number, got None"
    ),
    "scales of an objective": (
        lambda: objectives.ImprovedConsistencyTraining(start_scales=2.5), "start_scales must be a whole number, got 2.5"
    ),
    "intervals of an objective": (
        lambda: objectives.ProgressiveDistillation(start_scales=2.5), "start_scales must be a whole number, got 2.5"
    ),
    "scaled twice": (lambda: cmfast.Denoiser(D), "network is a Denoiser already"),
    "no network": (lambda: cmfast.Denoiser("x.pt"), "network must be F.x, timesteps., a module or a function, got str"),
    "a preconditioner's name": (lambda: cmfast.Denoiser(tenth, "edm"), "cmfast.Preconditioner or None, got 'edm'"),
    "rho in letters": (lambda: cmfast.Denoiser(tenth, rho="7"), "rho must be a number, got '7'"),
    "no sigma_max": (lambda: cmfast.Denoiser(tenth, sigma_max=None), "sigma_max must be a number, got None"),
    "sigma_data in letters": (lambda: cmfast.Preconditioner(sigma_data="a"), "sigma_data must be a number, got 'a'"),
    "no boundary": (lambda: cmfast.Preconditioner(boundary=None), "boundary must be a number, got None"),
    "a sampler of a file": (lambda: cmfast.Sampler("x.pt", 4), "a path, 'x.pt': cmfast.load makes a model of the file"),
    "a sampler of a path": (lambda: cmfast.Sampler(Path("x.pt"), 4), "a path, 'x.pt': cmfast.load"),
    "a sampler of nothing": (lambda: cmfast.Sampler(None, 4), "must be a Denoiser, or D.x, sigma., got NoneType"),
    "steps between steps": (lambda: sampler(ts=(0, 22.5, 39)), "ts must be a whole number, got 22.5"),
    "steps in letters": (
        lambda: sampler(ts="0,22,39"), r"ts must be whole numbers, such as \(0, 22, 39\), got '0,22,39'"
    ),
    "levels in letters": (lambda: samplers.sampler_sigmas("euler", sigmas=["a"]), "must be noise levels, .* got .'a'."),
    "an option that is none": (
        lambda: cmfast.sample(D, X, sampler="heun", s_chrun=1), "unknown option s_chrun of the heun"
    ),
    "an option of others": (
        lambda: cmfast.sample(D, X, rho=2.0), "unknown option rho of the multistep sampler; known: "
    ),
    "noise of NumPy": (lambda: cmfast.sample(D, X.numpy()), "noise must be a torch.Tensor, got ndarray"),
    "no noise": (lambda: sampler().generate(None), "noise must be a torch.Tensor, got NoneType"),
    "images of NumPy": (lambda: sampler().denoise(X.numpy(), 1.0), "x must be a torch.Tensor, got ndarray"),
    "no level": (lambda: sampler().denoise(X, None), "sigma must be a number, got None"),
    "a level in letters": (lambda: D(X, "80"), "sigma must be a number, got '80'"),
    "no images": (lambda: editing.colorize(D, None, X, [80.0]), "images must be a torch.Tensor, got NoneType"),
    "no noise to edit": (lambda: editing.inpaint(D, X, None, [80.0], X > 0), "x must be a torch.Tensor, got NoneType"),
    "no averages": (
        lambda: ops.ema_update_([X], None, [0.9]), "averages must be a list of lists of tensors, got NoneT"
    ),
    "a rate": (lambda: ema.Averages(torch.nn.Linear(1, 1), 0.99), "rates must be a list, .* got 0.99"),
    "an output in a tuple": (
        lambda: losses.improved_consistency_loss(cmfast.Denoiser(lambda x, t: (x,)), X, 11),
        "<lambda> must return a torch.Tensor like x, got tuple",
    ),
    "an output of diffusers": (
        lambda: sampler_of(SimpleNamespace).sample(2), "must return a torch.Tensor .* got SimpleNamespace: .*load"
    ),
    "a D in a list": (
        lambda: losses.denoising_loss(lambda x, s: [x], X, ONE), "<lambda> must return a torch.Tensor .* got list"
    ),
    "no parameters": (lambda: ema.Averages(None, [0.9]), "parameters must be a module, or .* got None"),
    "a shape of no order": (
        lambda: ops.normal(0, INDEX, {3, 4}), "shape must be a shape of integers of 0 or more, got {"
    ),
    "a shape that is a number": (lambda: ops.normal(0, INDEX, torch.tensor(3)), "shape must be a shape of integers"),
}  # fmt: skip



@pytest.mark.parametrize("name", CASES)
def test_values_that_are_refused(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", TYPES)
def test_types_that_are_refused(name):
    call, message = TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_the_number_of_an_average():
    with pytest.raises(IndexError, match="k must be the number of an average, from 0 to 0, got 3"):
        AVERAGES.module(3)
    assert torch.equal(AVERAGES.module(-1).weight, AVERAGES.module(0).weight)


def test_what_is_close_to_these_is_taken():
    """NumPy's numbers, tensors of one, the ends of a range."""
    assert np.array_equal(ops.normal(2**64 - 1, INDEX, np.array([3])), ops.normal(-1, INDEX, [3]))
    assert sampler(ts=(np.int64(0), torch.tensor(22), 39)).ts == (0, 22, 39)
    assert torch.isfinite(ect(0, q=1.01, k=0.0, b=0.0)["loss"]).all()
    assert cmfast.Preconditioner(np.float32(0.5), 0).boundary == 0.0
    assert torch.equal(D(X, np.float32(2)), D(X, torch.tensor(2.0)))
    consistency(np.int64(18), indices=LABELS.to(torch.uint8))


def test_settings_that_are_refused(tmp_path, monkeypatch):
    large = tmp_path / "large.yaml"
    large.write_text("a: 1\n" * 40)
    monkeypatch.setattr(config, "LARGEST", 100)
    with pytest.raises(ValueError, match="large.yaml is no file of settings: it has more than 100 bytes"):
        config.read(large)
    with pytest.raises(TypeError, match="levels must be a Grid or a LogNormal, got float"):
        ops.draw_levels(DRAW, 1.0)


def test_a_recipe_must_be_named(tmp_path, capsys):
    empty = tmp_path / "empty.yaml"
    empty.write_text("{}\n")
    assert cli.main(["train", "--config", str(empty)]) != 0
    assert "--recipe is missing: cd, ct, pd, ict, ect, edm or mnist" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_sample", interrupted)
    assert cli.main(["sample", "--num", "1", "--out", "x.png"]) == 130
    assert capsys.readouterr().err == "cmfast: interrupted\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu(capsys):
    assert cli.main(["sample", "--num", "1", "--device", "cuda", "--out", "x.png"]) != 0
    assert "--device cuda: torch finds no GPU here; leave it out to run on the CPU" in capsys.readouterr().err


def optimizer_step(**change):
    lists = {name: [ONE] for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")}
    ops.adam_ema_(**{**lists, "averages": [], "rates": torch.ones(0), "step": torch.zeros(()), "lr": 0.1, **change})


def test_lists_that_are_refused():
    for call, message in (
        (lambda: ops.grad_norm(ONE), "gradients must be a list of tensors"),
        (lambda: ops.ema_update_(ONE, [[ONE]], torch.ones(1)), "parameters must be a list of tensors"),
        (lambda: optimizer_step(parameters=ONE), "parameters must be a list of tensors"),
        (lambda: reference.group_norm_silu(X, 1, torch.ones(3), torch.ones(3), dropout=0.5), "dropout needs a draw"),
        (lambda: reference.snr_weight(ONE, "none"), "unknown weighting 'none'; known: "),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_files_that_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read the image .*a.png"):
        image_datasets._read(str(tmp_path / "a.png"))
    monkeypatch.setattr(decode, "MAX_BYTES", 5)
    with pytest.raises(ValueError, match="a file of 10 bytes, and no image has more than 5"):
        decode._check_file(tmp_path / "a.png")
    wide = {"block_out_channels": [2**14], "time_embedding_type": "learned", "num_train_timesteps": 1000}
    with pytest.raises(CheckpointError, match="config.json is of a network with .*, and there are 0 bytes"):
        network._check_size(tmp_path, wide)


def test_compressed_arrays_that_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, np.zeros((50, 8, 8, 3), np.uint8))
    monkeypatch.setattr(npz, "_memory", lambda: 1000)
    with pytest.raises(ValueError, match="takes 9,600 bytes, and this machine has 1,000: save it by np.savez"):
        open_data(path)
    monkeypatch.setattr(npz, "FREE", 100)
    monkeypatch.setattr(npz, "RATIO", 2)
    with pytest.raises(ValueError, match="would become 9,600 bytes from .*: no images do that"):
        open_data(path)


def test_what_a_writer_raises_is_an_oserror(tmp_path, monkeypatch):
    """PyTorch's is no Python."""

    def full(*args):
        raise RuntimeError("no space\nleft")

    monkeypatch.setattr(state.torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*state.pt: no space$"):
        toys.trainer("ect", tmp_path).save()


def test_a_lock_that_fails_for_another_reason(tmp_path, monkeypatch):
    def fail(handle, operation):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    with pytest.raises(OSError, match="input/output error"):
        with lock.locked(tmp_path):
            pass


def test_a_batch_that_processes_cannot_share(tmp_path):
    options = TrainOptions(steps=1, batch_size=6, learning_rate=1.0)
    with pytest.raises(ValueError, match="batch_size=6 cannot be shared by 4 processes alike"):
        Trainer(None, None, None, options, tmp_path, group=Ranks(0, 0, 4))


def test_a_checkpoint_is_not_damaged_where_rights_are_missing(monkeypatch, tmp_path):
    """So nobody is told to take it away."""
    def denied(self, step, folder):
        raise PermissionError("no rights")

    monkeypatch.setattr(state.State, "_read", denied)
    with pytest.raises(PermissionError, match="no rights"):
        state.State(torch.nn.Identity(), Ranks()).read(None, tmp_path)


def test_a_preconditioning_of_the_command_line(monkeypatch):
    seen = {}
    monkeypatch.setattr(checkpoint, "load", lambda path, **options: seen.update(options) or torch.nn.Identity())
    cli._load(SimpleNamespace(model="x.pt", device="cpu", preconditioning="edm"))
    assert seen == {"preconditioning": "edm", "device": torch.device("cpu")}
