"""Runs by name, from the command line and from YAML: what goes in, what comes out, and what is refused."""

import os
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

import cmfast
from cmfast import cli, fast, recipes, unet_config
from cmfast.checkpoint import load_teacher
from cmfast.objectives import OBJECTIVES
from cmfast.training import config
from tests.training.toys import OPTIONS, trainer, unet, weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine pictures in three classes; and as .npz."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        place = folder / "classes" / "abc"[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    np.savez(folder / "images.npz", pixels, np.arange(9) % 3)
    np.savez(folder / "unlabelled.npz", pixels)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "edm_teacher.safetensors"
    model = cmfast.Denoiser(unet(), cmfast.Preconditioner.edm(), image_shape=(3, 8, 8))
    cmfast.save(model, path)
    return str(path)


SHORT = ["--steps", "2", "--batch-size", "4", "--save-interval", "1"]
SMALL = [*SHORT, "--network", "tiny"]


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


@pytest.mark.parametrize("recipe", OBJECTIVES)
def test_every_recipe(recipe, images, teacher, tmp_path, capsys):
    more = [*SHORT, "--teacher", teacher] if OBJECTIVES[recipe].needs_teacher else SMALL
    names = {field.name for field in fields(OBJECTIVES[recipe])}
    more = [*more, "--loss-norm", "l2"] if "loss_norm" in names else more
    out = tmp_path / "run"
    assert train("--recipe", recipe, "--data", images / "classes", *more, "--out", out) == 0
    assert str(out / "model.safetensors") in capsys.readouterr().out
    model = cmfast.load(out / "model.safetensors")
    assert model.preconditioner.name == OBJECTIVES[recipe].preconditioning
    assert model.num_classes == (7 if "--teacher" in more else 3)
    # And it samples.
    grid = tmp_path / "x.png"
    assert cli.main(["sample", "--model", str(out / "model.safetensors"), "--num", "1", "--out", str(grid)]) == 0


def test_resume_and_yaml(images, tmp_path, capsys):
    """A run of 3 steps, and one of 2 that is gone on with from its own settings; then from its file."""
    data = ["--data", images / "images.npz", "--recipe", "ect", *SMALL]
    assert train(*data, "--steps", 3, "--out", tmp_path / "whole") == 0
    assert train(*data, "--out", tmp_path / "part") == 0
    assert train("--resume", "--out", tmp_path / "part", "--steps", 3) == 0
    assert train("--config", tmp_path / "whole" / "config.yaml", "--out", tmp_path / "again") == 0
    models = [cmfast.load(tmp_path / run / "model.safetensors") for run in ("whole", "part", "again")]
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert torch.equal(weights(models[0]), weights(models[2]))
    capsys.readouterr()
    assert train("--resume", "--out", tmp_path / "part", "--set", "options.warmup=5") == 2
    assert "options.warmup: 0, now 5" in capsys.readouterr().err
    assert train("--resume", "--out", tmp_path / "part", "--recipe", "ct") == 2
    assert "is of ect, as which it goes on: leave out --recipe" in capsys.readouterr().err
    written = (tmp_path / "part" / "config.yaml").read_text()
    assert train("--resume", "--out", tmp_path / "part", "--steps", 2) == 2
    assert "steps must be 3 or more, as the run in" in capsys.readouterr().err
    assert (tmp_path / "part" / "config.yaml").read_text() == written
    assert train(*data, "--out", tmp_path / "part") == 2 and "resume it" in capsys.readouterr().err


def test_what_a_run_began_with_may_be_gone(images, tmp_path):
    """The weights that --init named are those of no step but the first."""
    begin = tmp_path / "begin.safetensors"
    model = cmfast.Denoiser(unet(), image_shape=(3, 8, 8))
    cmfast.save(model, begin)
    given = ["--recipe", "ect", "--data", images / "classes", "--batch-size", "4", "--init", begin]
    for name, steps in (("run", 1), ("whole", 2)):
        assert train(*given, "--steps", steps, "--out", tmp_path / name) == 0
    begin.unlink()
    assert train("--resume", "--steps", 2, "--out", tmp_path / "run") == 0
    resumed, at_once = (cmfast.load(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert torch.equal(weights(resumed), weights(at_once))
    # Nothing stands in for it where there is no step.
    with pytest.raises(FileNotFoundError, match="begin"):
        recipes.trainer(config.read(tmp_path / "run" / "config.yaml"), tmp_path / "new", resume="auto")


@pytest.mark.parametrize("part, recipe", [("init", "ct"), ("teacher", "cd")], ids=["init", "teacher"])
def test_a_folder_of_diffusers_ends_in_a_file_of_ours(part, recipe, images, tmp_path):
    """And what --init named may be gone by the end."""
    diffusers_utils = pytest.importorskip("tests.compat.diffusers_utils")
    folder = tmp_path / "folder"
    diffusers_utils.small_unet(num_class_embeds=3).save_pretrained(folder)
    given = ["--recipe", recipe, "--data", images / "classes", "--loss-norm", "l2", "--batch-size", 4]
    assert train(*given, f"--{part}", folder, "--steps", 1, "--out", tmp_path / "run") == 0
    begin = cmfast.load(folder, convert=True)
    if part == "init":
        folder.rename(tmp_path / "elsewhere")
    assert train("--resume", "--steps", 2, "--out", tmp_path / "run") == 0
    assert cmfast.load(tmp_path / "run" / "model.safetensors").network.config == begin.network.config


def test_a_network_of_diffusers_without_a_counterpart(images, tmp_path):
    """It is trained as it is, and what that means is said."""
    diffusers_utils = pytest.importorskip("tests.compat.diffusers_utils")
    diffusers_utils.small_unet(norm_eps=1e-6).save_pretrained(tmp_path / "folder")
    settings = {"recipe": "ect", "paths": {"data": str(images / "unlabelled.npz"), "init": str(tmp_path / "folder")}}
    with pytest.warns(UserWarning, match=r"folder stays a network of diffusers: norm_eps=1e-06 has no "):
        run = recipes.trainer({**settings, "dropout": 0.1}, tmp_path / "run")
    network = run.step.model.network.unet
    assert type(network).__name__ == "UNet2DModel" and fast.refusal(network) is None
    assert network.mid_block.resnets[0].dropout.p == 0.1 and network.mid_block.attentions[0].to_out[1].p == 0


def test_settings_of_the_command_line(images, tmp_path, monkeypatch):
    out, made, model_of = tmp_path / "run", [], recipes._model
    monkeypatch.setattr(recipes, "_model", lambda *arguments: made.append(model_of(*arguments)) or made[-1])
    more = ["--flip", "--dropout", "0.3", "--averages", "0.9,power:0.1", "--dtype", "bfloat16", "--microbatch", "2"]
    more += ["--set", "options.warmup=3", "--set", "objective.end_scales=9", "--unlabelled", "--image-size", "16"]
    data = ["--data", images / "classes", "--recipe", "ct", "--loss-norm", "huber"]
    assert train(*data, *SMALL, *more, "--out", out) == 0
    saved = config.read(out / "config.yaml")
    assert saved["data"]["flip"] and saved["options"]["averages"] == ["0.9", "power:0.1"]
    assert saved["objective"]["end_scales"] == 9 and saved["objective"]["total_steps"] == 2
    model = cmfast.load(out / "model.safetensors")
    assert model.num_classes is None and model.image_shape == (3, 16, 16)
    assert {layer.p for layer in made[0].modules() if isinstance(layer, torch.nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "nope"], "unknown recipe 'nope'; known: edm, cd"),
        (["--recipe", "edm"], "data is missing: a folder"),
        (["--recipe", "cd", "--data", "DATA"], "needs a teacher"),
        (["--recipe", "edm", "--data", "DATA", "--network", "huge"], "known: tiny, small"),
        (["--recipe", "edm", "--data", "DATA", "--loss-norm", "l2"], "the objective of edm knows no loss_norm"),
        (["--recipe", "edm", "--data", "DATA", "--set", "options.nope=1"], "options knows no nope"),
        (["--recipe", "edm", "--data", "DATA", "--set", "nope=1"], "settings know no nope"),
        (["--recipe", "edm", "--data", "DATA", "--dtype", "int8"], "dtype must be one of"),
        (["--recipe", "edm", "--data", "DATA/missing"], "missing"),
        (["--recipe", "cd", "--data", "UNLABELLED", "--teacher", "TEACHER", "--loss-norm", "l2"], "no labels"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "DATA"], "no run to resume"),
        (["--config", "DATA/missing.yaml"], "missing.yaml"),
        (["--recipe", "edm", "--set", "options.steps=abc"], "options: steps must be a whole number, got 'abc'"),
        (["--recipe", "edm", "--set", "options.steps=1.5"], "options: steps must be a whole number, got 1.5"),
        (["--recipe", "edm", "--set", "options.graphs=1"], "options: graphs must be True or False, got 1"),
        (["--recipe", "edm", "--set", "options.keep=all"], "options: keep must be a whole number or None, got 'all'"),
        (["--recipe", "edm", "--set", "options.learning_rate=fast"], "learning_rate must be a number, got 'fast'"),
        (["--recipe", "edm", "--set", "options.betas=(0.9,)"], "betas must be a list of 2, each a number, got (0.9,)"),
        (["--recipe", "edm", "--set", "options.averages=[]"], "averages must have one rate or more"),
        (["--recipe", "edm", "--set", "objective.std=wide"], "the objective of edm: std must be a number, got 'wide'"),
        (["--recipe", "edm", "--set", "dropout=2"], "dropout must be from 0 to 1, or None, got 2"),
        (["--config", "FLAT", "--data", "DATA"], "paths is a group of settings, as in paths.NAME, got 'images/'"),
        (["--config", "FLAT", "--steps", "3"], "is a group of settings, as in "),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_refused(arguments, message, images, teacher, capsys):
    (images / "flat.yaml").write_text("recipe: edm\npaths: images/\noptions:\n")
    places = {"UNLABELLED": images / "unlabelled.npz", "TEACHER": teacher, "FLAT": images / "flat.yaml"}
    given = [str(places.get(a, a.replace("DATA", str(images / "classes")))) for a in arguments]
    assert train(*given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["cd", "pd"])
def test_bare_weights_of_a_teacher_are_a_diffusion_model(recipe, images, tmp_path, monkeypatch):
    """What the original's edm_train.py writes is called ema_0.9999_600000.pt, and cm_train.py knows it for one."""
    network = unet()
    # Bare weights are those of a published architecture.
    config = unet_config.from_shapes({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    monkeypatch.setattr(unet_config, "PUBLISHED", {"toy": (config, {"image_size": 8, "num_head_channels": 16})})
    torch.save(network.state_dict(), tmp_path / "ema_0.9999_600000.pt")
    assert cmfast.load(tmp_path / "ema_0.9999_600000.pt").preconditioner.name == "consistency"
    run = recipes.trainer(distilling(recipe, images, tmp_path / "ema_0.9999_600000.pt"), tmp_path / "run")
    assert run.step.teacher_model.preconditioner == cmfast.Preconditioner.edm()
    assert run.step.model.preconditioner.name == OBJECTIVES[recipe].preconditioning
    # As a start they say nothing about scalings: those are the objective's.
    settings = distilling(recipe, images, tmp_path / "ema_0.9999_600000.pt")
    settings["paths"]["init"] = settings["paths"]["teacher"]
    start = recipes.trainer(settings, tmp_path / "other").step.model
    assert start.preconditioner == run.step.model.preconditioner


def test_rectangles(tmp_path):
    """A new network for images that are no squares, which a file keeps."""
    np.savez(tmp_path / "wide.npz", np.random.default_rng(0).integers(0, 256, (8, 8, 12, 3), np.uint8))
    given = ["--recipe", "edm", "--data", tmp_path / "wide.npz", *SMALL, "--out", tmp_path / "run"]
    assert train(*given) == 0
    model = cmfast.load(tmp_path / "run" / "model.safetensors")
    assert model.image_shape == (3, 8, 12)
    assert cmfast.Sampler(model, 2, sampler="heun", steps=2).sample(2).shape == (2, 8, 12, 3)


@pytest.mark.parametrize("recipe", ["cd", "pd"])
def test_a_consistency_model_is_no_teacher(recipe, images, tmp_path):
    cmfast.save(cmfast.Denoiser(unet(), image_shape=(3, 8, 8)), tmp_path / "edm_model.safetensors")
    with pytest.raises(ValueError, match=r"edm_model\.safetensors is a consistency model, and a teacher is"):
        recipes.trainer(distilling(recipe, images, tmp_path / "edm_model.safetensors"), tmp_path / "run")


@pytest.mark.parametrize("name, kind", [("ect", "consistency"), ("edm", "diffusion")])
def test_files_of_a_run_say_what_it_makes(name, kind, tmp_path):
    """ECT's scalings are a diffusion model's, and it is none any more; a file from before says nothing of it."""
    average = trainer(name, tmp_path / "run", replace(OPTIONS, steps=1)).run(progress=False)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    files = [tmp_path / "run" / "model.safetensors", *checkpoint.glob("*.safetensors")]
    assert len(files) == 4
    for path in files:
        assert cmfast.load(path).preconditioner.name == "edm"
        if kind == "consistency":
            with pytest.raises(ValueError, match="is a consistency model, and a teacher is a diffusion model"):
                load_teacher(path)
        else:
            load_teacher(path)
    cmfast.save(average, tmp_path / "before.safetensors")
    load_teacher(tmp_path / "before.safetensors")


@pytest.mark.parametrize("recipe", ["cd", "pd"])
def test_noise_levels_are_those_of_the_teacher(recipe, images, tmp_path):
    """As far as the settings say nothing; the student has those of the objective, and so has its file."""
    levels = {"sigma_min": 0.02, "sigma_max": 10.0, "rho": 5.0}
    path = tmp_path / "narrow.safetensors"
    cmfast.save(cmfast.Denoiser(unet(), cmfast.Preconditioner.edm(), image_shape=(3, 8, 8), **levels), path)
    for given in ({}, {"sigma_max": 9.0}):
        settings = distilling(recipe, images, path)
        settings["objective"] |= given
        run = recipes.trainer(settings, tmp_path / f"run{len(given)}")
        run.run(progress=False)
        student = cmfast.load(tmp_path / f"run{len(given)}" / "model.safetensors")
        for model in (run.step.objective, student):
            assert {name: getattr(model, name) for name in levels} == levels | given
        assert student.preconditioner.boundary == (0.02 if recipe == "cd" else 0.0)
    # And a run that goes on has them from its settings.
    saved = config.read(tmp_path / "run1" / "config.yaml")
    assert saved["objective"]["sigma_min"] == 0.02 and saved["objective"]["sigma_max"] == 9.0
    assert recipes.trainer(saved, tmp_path / "run1", resume=True).done == 1


def test_new_weights_are_for_the_noise_levels_that_are_set(images, tmp_path):
    data = ["--recipe", "ct", "--data", images / "classes", "--loss-norm", "l2", *SMALL]
    levels = [f"objective.{name}" for name in ("sigma_min=0.05", "sigma_max=10", "rho=3")]
    assert train(*data, *(word for level in levels for word in ("--set", level)), "--out", tmp_path) == 0
    model = cmfast.load(tmp_path / "model.safetensors")
    assert (model.sigma_min, model.sigma_max, model.rho) == (0.05, 10, 3)
    assert cmfast.Sampler(model, 1, steps=1).sigmas == [10.0]
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(x, 0.05, torch.zeros(1, dtype=torch.int64)), x)


def distilling(recipe, images, teacher, **options):
    return {"recipe": recipe, "objective": {"loss_norm": "l2"}, "options": {"steps": 1, "batch_size": 2, **options},
            "paths": {"data": str(images / "classes"), "teacher": str(teacher)}}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["torso", "all"])
def test_files_in_half_precision_are_trained_in_float32(part, options, images, tmp_path):
    """A file whose torso is float16, or all of it; teacher and student, weights and moments."""
    model = cmfast.Denoiser(unet(), cmfast.Preconditioner.edm(), image_shape=(3, 8, 8))
    model.network.convert_torso(torch.float16) if part == "torso" else model.network.half()
    cmfast.save(model, tmp_path / "half.safetensors")
    assert torch.float16 in {p.dtype for p in cmfast.load(tmp_path / "half.safetensors").parameters()}
    run = recipes.trainer(distilling("cd", images, tmp_path / "half.safetensors", **options), tmp_path / "run")
    result = run.run(progress=False)
    moments = [s["exp_avg"] for s in run.step.optimizer.state.values()]
    tensors = [*run.step.model.parameters(), *run.step.teacher_model.parameters(), *result.parameters(), *moments]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_the_home_of_a_user(monkeypatch):
    """In settings, which no shell has read."""
    monkeypatch.setenv("HOME", os.sep + "home")
    given = {"recipe": "cd", "paths": {"data": "~/images", "teacher": "a~b.pt"}}
    paths = recipes.complete(given)["paths"]
    assert (paths["data"], paths["teacher"], paths["init"]) == (os.path.join(os.sep + "home", "images"), "a~b.pt", None)


def test_numbers_as_yaml_has_them(tmp_path):
    """1e-4 without a dot is a text there, and rates of averages are numbers."""
    text = "recipe: ict\noptions: {learning_rate: 1e-4, averages: [0.9, power:0.1], eps: 1}\n"
    (tmp_path / "x.yaml").write_text(text + "objective: {huber_c: 1e-2}\n")
    settings = recipes.complete(config.read(tmp_path / "x.yaml"))
    assert settings["options"]["learning_rate"] == 1e-4 and settings["objective"]["huber_c"] == 0.01
    assert settings["options"]["averages"] == [0.9, "power:0.1"]


def test_progressive_distillation_ends_in_one_step():
    """The recipe has all stages, the last of them as long as the one before."""
    settings = recipes.complete({"recipe": "pd"})
    steps, objective = settings["options"]["steps"], recipes.objective(settings)
    last, before = objective.stage(steps - 1), objective.stage(objective.stage(steps - 1).first_step - 1)
    assert (last.num_scales, before.num_scales) == (1, 2)
    assert steps - last.first_step == before.steps == 100_000


def test_stages_are_of_a_run_of_as_many_steps():
    """Unless the settings say otherwise."""
    cases = {("ect", 4000): {}, ("pd", 4500): {}, ("pd", 100): {"start_scales": 4}, ("ect", 3): {}}
    made = [
        recipes.complete({"recipe": recipe, "options": {"steps": n}, "objective": given})
        for (recipe, n), given in cases.items()
    ]
    assert [settings["objective"]["steps_per_stage"] for settings in made] == [500, 500, 20, 1]
    given = {"recipe": "ect", "objective": {"steps_per_stage": 7}}
    assert recipes.complete(given)["objective"]["steps_per_stage"] == 7


class Made:
    """In place of a trainer: the settings that it was to have."""

    def __init__(self, settings, *arguments, **options):
        Made.settings = recipes.complete(settings)

    def run(self, **options):
        pass


@pytest.mark.parametrize("recipe, name", [("ct", "total_steps"), ("ect", "steps_per_stage"), ("pd", "steps_per_stage")])
def test_the_steps_of_a_file_of_settings(recipe, name, tmp_path, monkeypatch):
    """With others on the command line, the curriculum is theirs; one that was asked for stays, and that of a run that
    goes on."""
    monkeypatch.setattr(recipes, "trainer", Made)
    file = tmp_path / "config.yaml"
    of = {steps: recipes.complete({"recipe": recipe, "options": {"steps": steps}}) for steps in (7200, 720)}
    assert of[7200]["objective"][name] == 10 * of[720]["objective"][name]
    for given, more, expected in (
        (of[7200], ["--steps", 720], of[720]["objective"][name]),
        (of[7200], ["--set", "options.steps=720"], of[720]["objective"][name]),
        (of[7200], [], of[7200]["objective"][name]),
        (of[7200], ["--steps", 720, "--set", f"objective.{name}=7"], 7),
        ({**of[7200], "objective": {**of[7200]["objective"], name: 50}}, ["--steps", 720], 50),
        (of[7200], ["--steps", 720, "--resume"], of[7200]["objective"][name]),
    ):
        file.write_text(config.written(given))
        assert train("--config", file, "--out", tmp_path, *more) == 0
        assert Made.settings["objective"][name] == expected, more
    # Of a file that does not say whose settings they are, nothing is known to follow.
    file.write_text(config.written({part: of[7200][part] for part in ("objective", "options")}))
    assert train("--config", file, "--recipe", recipe, "--steps", 720, "--out", tmp_path) == 0
    assert Made.settings["objective"][name] == of[7200]["objective"][name]


def test_the_deviation_of_the_data_is_one(images, tmp_path):
    """That of the settings for new weights; of a model to start from its own."""
    settings = {"recipe": "edm", "paths": {"data": str(images / "classes")}, "network": "tiny",
                "options": {"steps": 1, "batch_size": 2}}  # fmt: skip
    run = recipes.trainer({**settings, "objective": {"sigma_data": 0.25}}, tmp_path / "new")
    assert run.step.model.preconditioner.sigma_data == 0.25
    start = cmfast.Denoiser(unet(), cmfast.Preconditioner.edm(1.0), image_shape=(3, 8, 8))
    cmfast.save(start, tmp_path / "x.safetensors")
    settings["paths"]["init"] = str(tmp_path / "x.safetensors")
    del settings["network"]
    run = recipes.trainer(settings, tmp_path / "old")
    assert run.step.objective.sigma_data == run.step.model.preconditioner.sigma_data == 1.0
    with pytest.raises(ValueError, match=r"a model with sigma_data=0\.25, not 1\."):
        recipes.trainer({**settings, "objective": {"sigma_data": 0.25}}, tmp_path / "both")


@pytest.mark.parametrize("part, recipe", [("init", "ect"), ("teacher", "cd")], ids=["init", "teacher"])
def test_a_network_beside_other_weights(part, recipe, images, teacher, tmp_path, capsys):
    """That of somebody's settings would be another than trained; that of a run's own is what it began with."""
    given = {"recipe": recipe, "paths": {"data": str(images / "classes"), part: teacher},
             "objective": {"loss_norm": "l2"} if recipe == "cd" else {},
             "options": {"steps": 1, "batch_size": 2}}  # fmt: skip
    with pytest.raises(ValueError, match=f"network makes new weights, and paths.{part} names others: leave network"):
        recipes.trainer({**given, "network": "tiny"}, tmp_path / "run")
    recipes.trainer(recipes.complete(given), tmp_path / "run").run(progress=False)
    saved = {**config.read(tmp_path / "run" / "config.yaml"), "network": "tiny"}
    recipes.trainer(saved, tmp_path / "again").run(progress=False)
    assert recipes.trainer({**given, "network": "tiny"}, tmp_path / "again", resume=True).done == 1
    # But not where it is asked for beside a run's settings.
    assert train("--config", tmp_path / "run" / "config.yaml", "--network", "small", "--out", tmp_path / "no") == 2
    assert f"network makes new weights, and paths.{part} names others" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, right, wrong",
    [("num_classes", 3, 1000), ("num_classes", 3, None), ("image_size", 8, 32), ("out_channels", 3, 6)],
)
def test_a_network_says_what_the_data_do(name, right, wrong, images, tmp_path):
    """Or nothing of it."""
    given = {"recipe": "edm", "paths": {"data": str(images / "classes")}, "options": {"steps": 1, "batch_size": 2}}
    run = recipes.trainer({**given, "network": {**recipes.NETWORKS["tiny"], name: right}}, tmp_path / "run")
    assert run.step.model.num_classes == 3
    with pytest.raises(ValueError, match=f"network: {name} is that of the data, {right}, got {wrong}: leave it out"):
        recipes.trainer({**given, "network": {**recipes.NETWORKS["tiny"], name: wrong}}, tmp_path / "run")


def test_rates_with_arguments(images, tmp_path):
    rates = "0.9,halflife:500,batch=4,rampup=0.05,power:0.1"
    data = ["--recipe", "edm", "--data", images / "classes", *SMALL]
    assert train(*data, "--averages", rates, "--out", tmp_path) == 0
    saved = config.read(tmp_path / "config.yaml")["options"]["averages"]
    assert saved == ["0.9", "halflife:500,batch=4,rampup=0.05", "power:0.1"]


def test_lpips_is_made_where_it_is_asked_for(images, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    settings = {"recipe": "ct", "paths": {"data": images / "classes"}, "network": "tiny",
                "lpips": {"net": "alex", "pretrained": False}, "options": {"steps": 1, "batch_size": 2}}  # fmt: skip
    run = recipes.trainer(settings, tmp_path)
    assert run.step.lpips.net == "alex"
    run.run(progress=False)


def test_what_torchrun_starts_again_goes_on(images, tmp_path, monkeypatch, capsys):
    command = ["--recipe", "edm", "--data", images / "classes", *SMALL, "--out", tmp_path / "run"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(*command) == 0  # where it was lost before the first checkpoint
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train(*command) == 2 and "holds a run (step-00000002)" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(*command) == 0
