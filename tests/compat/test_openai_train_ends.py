"""cm.train_util: where runs end, what they leave, and how they are resumed."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cmfast.compat.openai import _checkpoints, logger, train_util
from cmfast.tolerances import GOLDEN_TRAINED
from tests.compat.openai_train_utils import (  # noqa: F401  # fixtures
    Small,
    batches,
    cm_loop,
    edm_loop,
    folder_of_logs,
    names,
    process_group,
)
from tests.golden_utils import relative_error


def saved_at(folder, name):
    return sorted(int(path.stem[len(name) :]) for path in Path(folder).glob(f"{name}[0-9]*.pt"))


def test_edm_ends_with_its_learning_rate(log_dir):
    loop = edm_loop(save_interval=2)
    rates = []
    loop.log_step = lambda: rates.append(loop.opt.param_groups[0]["lr"])
    loop.run_loop()
    assert rates == pytest.approx([1e-2 * 2 / 3, 1e-2 / 3, 0])
    assert saved_at(log_dir, "model") == saved_at(log_dir, "opt") == saved_at(log_dir, "ema_0.5_") == [2, 3]


@pytest.mark.parametrize("make", [edm_loop, lambda **options: cm_loop(total_training_steps=3, **options)])
def test_the_last_checkpoint_is_written_once(make, log_dir):
    loop, saves = make(save_interval=3, lr_anneal_steps=3), []
    loop.save = lambda: saves.append(loop.step)
    loop.run_loop()
    assert saves == [3]


def test_consistency_ends_at_total_training_steps(log_dir):
    cm_loop(total_training_steps=2).run_loop()
    assert names(log_dir) == [
        "ema_0.5_000002.pt",
        "ema_0.9_000002.pt",
        "model000002.pt",
        "opt000002.pt",
        "target_model000002.pt",
    ]
    loop = cm_loop(total_training_steps=1, lr_anneal_steps=3)
    loop.run_loop()
    assert loop.global_step == 3
    loop.run_step(*next(loop.data))
    assert loop.opt.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("make", [edm_loop, cm_loop])
def test_integration_tests_end_after_a_checkpoint(make, log_dir, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    make(save_interval=2).run_loop()
    assert saved_at(log_dir, "model") == [2]


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("mode, cut", [("edm", 3), ("consistency_distillation", 3), ("progdist", 2), ("progdist", 3)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(mode, cut, use_fp16, tmp_path):
    """The files hold neither the generators nor the loss scale, nor the target in more than the network's float16."""

    def make(**changes):
        changes |= {"use_fp16": use_fp16, "fp16_scale_growth": 0.0}
        if mode == "edm":
            return edm_loop(lr_anneal_steps=10, **changes)
        return cm_loop(mode, total_training_steps=10, **changes)

    def run(loop, start, end):
        loop.mp_trainer.lg_loss_scale = 8.0
        data = itertools.islice(batches(), start, None)
        for step in range(start, end):
            torch.manual_seed(step)
            np.random.seed(step)
            loop.run_step(*next(data))

    rounded = use_fp16 and mode == "consistency_distillation"
    logger.configure(str(tmp_path / "whole"), [])
    whole = make()
    run(whole, 0, 6)
    whole.save()
    logger.configure(str(tmp_path / "first"), [])
    first = make()
    run(first, 0, cut)
    first.save()
    logger.configure(str(tmp_path / "second"), [])
    second = make(resume_checkpoint=str(tmp_path / "first" / f"model{cut:06d}.pt"))
    assert second.step == first.step and second.resume_step == cut
    assert second.opt.param_groups[0]["lr"] == first.opt.param_groups[0]["lr"]
    run(second, cut, 6)
    assert second.step == whole.step
    assert logger.getkvs()["step"] == 6
    pairs = [(whole.mp_trainer.master_params, second.mp_trainer.master_params)]
    pairs += zip(whole.ema_params, second.ema_params, strict=True)
    for expected, got in pairs:
        for a, b in zip(expected, got, strict=True):
            assert relative_error(b, a) <= (GOLDEN_TRAINED[torch.float16] if rounded else 0)
    second.save()
    assert names(tmp_path / "second") == names(tmp_path / "whole")
    assert {int(Path(name).stem[-6:]) for name in names(tmp_path / "second")} == {6}


def test_resuming_without_the_other_files(tmp_path, log_dir):
    edm_loop().save()
    shutil.copy(log_dir / "model000000.pt", tmp_path / "model000007.pt")
    loop = edm_loop(resume_checkpoint=str(tmp_path / "model000007.pt"))
    assert loop.step == 7 and not loop.opt.state
    assert all(torch.equal(a, b) for a, b in zip(loop.ema_params[1], loop.mp_trainer.master_params, strict=True))


def test_a_folder_of_users_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(train_util, "get_blob_logdir", lambda: str(tmp_path / "runs" / "1"))
    edm_loop().save()
    assert "model000000.pt" in names(tmp_path / "runs" / "1")


def test_a_crash_while_saving_loses_nothing(monkeypatch, log_dir):
    loop = edm_loop()
    loop.save()
    before = {name: (log_dir / name).read_bytes() for name in names(log_dir)}
    assert len(before) == 4

    def full_disk(state, file):
        file.write(b"half of it")
        raise RuntimeError("[enforce fail] unexpected pos 64 vs 0")

    monkeypatch.setattr(_checkpoints.torch, "save", full_disk)
    with pytest.raises(OSError, match="cannot write .*ema_0.5_000000.pt"):
        loop.save()
    assert {path.name: path.read_bytes() for path in log_dir.glob("*.pt*")} == before
    assert not list(log_dir.glob(".*"))


@pytest.mark.parametrize(
    "name, step",
    [
        ("a/model/model000012.pt", 12),
        ("target_model000012.pt", 12),
        ("model3", 3),
        ("ema_0.9_000012.pt", 0),
        ("models/ema_0.9_000012.pt", 0),
        ("model_final.pt", 0),
    ],
)
def test_parse_resume_step_from_filename(name, step):
    assert train_util.parse_resume_step_from_filename(name) == step


def test_a_checkpoint_of_another_network(log_dir):
    edm_loop().save()
    with pytest.raises(ValueError, match="model000000.pt does not fit.*torso.weight"):
        edm_loop(model=Small(5), resume_checkpoint=str(log_dir / "model000000.pt"))
    edm_loop(lr_anneal_steps=2).run_loop()
    with pytest.raises(ValueError, match="opt000002.pt belongs to.*another use_fp16"):
        edm_loop(use_fp16=True, resume_checkpoint=str(log_dir / "model000002.pt"))
    with pytest.raises(FileNotFoundError, match="model000009.pt"):
        edm_loop(resume_checkpoint=str(log_dir / "model000009.pt"))
