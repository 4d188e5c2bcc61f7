"""Files of a run: what they can hold, and what becomes of damaged ones."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import cmfast
from cmfast.checkpoint import CheckpointError
from cmfast.data import ImageData
from cmfast.objectives import EDM
from cmfast.training import Trainer, checkpoints, state
from tests.training.toys import DATA, OPTIONS


class Grows(nn.Module):
    """Makes a part of itself in its first pass, or keeps what is no tensor."""

    def __init__(self, kind=""):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 3, 1), kind
        self.register_buffer("last", torch.ones(()))

    def forward(self, x, t):
        if self.kind == "module" and not hasattr(self, "late"):
            self.late = nn.Conv2d(3, 3, 1)
        if self.kind == "buffer" and not hasattr(self, "positions"):
            self.register_buffer("positions", torch.ones(3, 1, 1))
        if self.kind == "shape" and self.last.dim() == 0:
            self.last = torch.ones(3, 1, 1)
        return self.conv(x) * self.last


class Extra(Grows):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, extra):
        pass


def trainer(out, network, steps=3, **more):
    model = cmfast.Denoiser(network, cmfast.Preconditioner.edm(), image_shape=(3, 8, 8))
    options = replace(OPTIONS, steps=steps, save_interval=2, log_interval=1)
    return Trainer(model, EDM(), ImageData(DATA.images), options, out, **more)


@pytest.mark.parametrize(
    "kind, named", [("module", r"late\.weight, late\.bias"), ("buffer", "positions"), ("shape", "last")]
)
def test_a_network_that_grows_is_found_at_once(tmp_path, kind, named):
    with pytest.raises(ValueError, match=rf"the network has made or changed {named} in its first step"):
        trainer(tmp_path, Grows(kind)).run(progress=False)


def test_what_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="_extra_state of the network's state is a dict"):
        trainer(tmp_path, Extra())


@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_a_damaged_state_says_what_to_do(tmp_path, damage):
    """And when it is done, the run goes on from the checkpoint before."""
    trainer(tmp_path, Grows()).run(progress=False)
    folder = checkpoints.newest(tmp_path)
    path = folder / state.STATE
    whole = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(whole[: 0 if damage == "empty" else len(whole) // 2])
    with pytest.raises(CheckpointError, match="step-00000003 is damaged: .*Take this folder away, and the run goes on"):
        trainer(tmp_path, Grows(), 4, resume=True)
    folder.rename(tmp_path / "away")
    assert trainer(tmp_path, Grows(), 4, resume=True).done == 2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped into memory")
def test_nothing_of_a_checkpoint_is_held_open(tmp_path):
    """Whose disk space would not be given back."""
    trainer(tmp_path, Grows()).run(progress=False)
    resumed = trainer(tmp_path, Grows(), 4, resume=True)
    mapped = Path("/proc/self/maps").read_text()
    assert resumed.done == 3 and not re.search(re.escape(str(tmp_path)), mapped)
