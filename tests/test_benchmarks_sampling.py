"""The benchmark of sampling: every provider runs on a tiny network, none that is off is timed, the bars are right."""

import copy
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cmfast.benchmarks import choices, gpu, networks, providers, sampling, sampling_summary, timing
from cmfast.benchmarks.convolutions import Convolutions, convolutions_of
from cmfast.benchmarks.liveness import Liveness, forward_peak, weight_bytes
from cmfast.benchmarks.original import _stand_ins, original_unet
from cmfast.fast.network import has_onednn

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

ORIGINAL = '''
import cmfast

class UNetModel(cmfast.UNetModel):
    """In the place of the original, whose network is the same; it wants these while it is built."""
    def __init__(self, **options):
        from einops import rearrange
        from flash_attn.flash_attention import FlashAttention
        FlashAttention(attention_dropout=0.0, device=None, dtype=None)
        super().__init__(**options)
'''


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(sampling, "BUDGET_S", {"cpu": 0.01})


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with a `cm`, which no other test finds imported."""
    folder = tmp_path / "checkout"
    (folder / "cm").mkdir(parents=True)
    (folder / "cm" / "__init__.py").touch()
    (folder / "cm" / "unet.py").write_text(ORIGINAL)
    yield folder
    for name in ("cm", "cm.unet"):
        sys.modules.pop(name, None)


def recorded(folder, *options):
    """The exit status and the JSON of a run of the tiny network."""
    arguments = ["--network", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(folder / "out"), *options]
    status = sampling.main(arguments)
    (path,) = (folder / "out").glob("*.json")
    return status, json.loads(path.read_text())


def test_every_provider(tmp_path, checkout, monkeypatch, capsys):
    """Compilers aside: torch.compile gives back what it was given."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    names = list(providers.PROVIDERS)
    status, result = recorded(
        tmp_path, "--batches", "1,3", "--openai", str(checkout), "--providers", ",".join(names)
    )
    assert status == 0, result["failures"]
    missing = set() if find_spec("diffusers") else {"diffusers", "diffusers_compile"}
    if sampling.inductor_refusal(CPU):
        missing |= set(providers.COMPILED)
    assert set(result["missing"]) == missing
    expected = [(batch, name) for batch in (1, 3) for name in names if name not in missing]
    assert [(row["batch"], row["provider"]) for row in result["rows"]] == expected
    for row in result["rows"]:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["dtype"] == "float32"
        if row["images_per_s"] is not None:
            assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"], rel=0.01)
    assert result["weight_bytes"] == weight_bytes("tiny", torch.float32) and result["liveness_bytes"]["3"] > 0
    assert str(tmp_path) not in json.dumps(result)
    out = capsys.readouterr().out
    assert "no bars" in out and "stand-ins for" in out
    assert sampling.main(["--report", str(next((tmp_path / "out").glob("*.json")))]) == 0
    assert capsys.readouterr().out.strip() in out


def test_default_trials(tmp_path):
    """And two steps; a provider that is not there is named, with the reason, and is no failure."""
    status, result = recorded(tmp_path, "--batches", "2")
    assert status == 0, result["failures"]
    assert {(row["provider"], row["steps"]) for row in result["rows"]} == {
        *((name, 1) for name in ("convolutions", "convolutions_unpacked", "reference", "reference_channels_last")),
        *(("diffusers", 1) for _ in range(bool(find_spec("diffusers")))), ("cmfast", 1),
        ("reference", 2), *(("diffusers", 2) for _ in range(bool(find_spec("diffusers")))), ("cmfast", 2),
    }
    assert "--openai" in result["missing"]["openai"]


class Altered(providers.Engine):
    """cmfast with a fault."""

    def __init__(self, fault, models, trial):
        super().__init__(models, trial, models.contiguous)
        self.fault = fault

    def denoised(self, noise, labels):
        made = super().denoised(noise, labels)
        if self.fault == "a part in a thousand":
            return made * 1.001
        if self.fault == "NaN in the last image":
            made[-1, 0, 0, 0] = float("nan")
        return made

    def sample(self, n):
        made = super().sample(n)
        if self.fault == "a pixel of the last image":
            made[-1, 0, 0, 0] ^= 8
        if self.fault == "another seed":
            return self.sampler.sample(n, seed=1)
        if self.fault == "floating point":
            return made.float()
        if self.fault == "an error":
            raise RuntimeError("this one does not run")
        return made


@pytest.mark.parametrize(
    "fault",
    ["a part in a thousand", "NaN in the last image", "a pixel of the last image", "another seed", "floating point",
     "an error"],
)
def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setitem(providers.PROVIDERS, "cmfast", lambda models, trial: Altered(fault, models, trial))
    status, result = recorded(tmp_path, "--batches", "2", "--providers", "reference,cmfast")
    assert status == 1
    assert [row["provider"] for row in result["rows"]] == ["reference"]
    assert [failure["provider"] for failure in result["failures"]] == ["cmfast"]
    assert "FAILED, not timed: batch 2" in capsys.readouterr().out


def test_wrong_weights_of_another_network_are_caught(tmp_path, monkeypatch, checkout):
    """A rival with other weights: nothing of it is drawn by cmfast."""

    def other(network, path, *, fp16):
        return original_unet(networks.fill_(copy.deepcopy(network), seed=1), path, fp16=fp16)

    monkeypatch.setattr(providers, "original_unet", other)
    status, result = recorded(tmp_path, "--batches", "1", "--openai", str(checkout), "--providers", "openai")
    assert status == 1 and "relative error" in result["failures"][0]["reason"]


def test_a_wrong_baseline_is_caught_too(tmp_path, monkeypatch):
    norm = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *a, **k: norm(x, *a, **k) * (1 + 1e-4 * (x.dtype == torch.float32)))
    status, result = recorded(tmp_path, "--batches", "1", "--providers", "reference")
    assert status == 1 and "plain PyTorch" in result["failures"][0]["reason"]


def test_kernels_are_counted_when_all_is_timed(tmp_path, monkeypatch):
    """A profiler slows down launches for as long as it is attached."""
    done, interleave = [], timing.interleave
    monkeypatch.setattr(timing, "interleave", lambda *a, **more: (interleave(*a, **more), done.append("timed"))[0])
    monkeypatch.setattr(timing, "count_kernels", lambda device, work: (work(), done.append("counted"), 7)[2])
    status, result = recorded(tmp_path, "--batches", "2", "--providers", "reference,cmfast")
    assert status == 0 and done == ["timed", "counted", "counted"]
    assert [row["kernels"] for row in result["rows"]] == [7, 7]


@pytest.mark.parametrize("batches", [4, 6], ids=["before the rounds", "in a round"])
def test_one_that_fails_while_it_is_timed(tmp_path, monkeypatch, batches):
    """The others have their rows all the same."""
    class Fails(providers.Engine):
        made = 0

        def sample(self, n):
            self.made += 1
            if self.made >= batches:
                raise torch.OutOfMemoryError("this many bytes")
            return super().sample(n)

    monkeypatch.setitem(providers.PROVIDERS, "reference", lambda models, trial: Fails(models, trial, models.contiguous))
    status, result = recorded(tmp_path, "--batches", "2", "--providers", "cmfast,reference", "--rounds", "3")
    assert status == 1 and [row["provider"] for row in result["rows"]] == ["cmfast"]
    assert [f["reason"] for f in result["failures"]] == ["OutOfMemoryError: this many bytes"]
    assert result["failures"][0]["provider"].startswith("reference")


def test_other_samplers(tmp_path, monkeypatch):
    trial = providers.Trial(2, ("cmfast",), sampler="heun", steps=3)
    monkeypatch.setattr(sampling, "trials", lambda *arguments: [trial])
    status, result = recorded(tmp_path)
    assert status == 0, result["failures"]
    assert [(row["sampler"], row["steps"]) for row in result["rows"]] == [("heun", 3)]


def test_two_steps(tmp_path, checkout, monkeypatch):
    """Of every network, through the gate: noise and clipping between steps are those of `Sampler`."""
    names = ("reference", "openai", *(("diffusers",) if find_spec("diffusers") else ()), "cmfast")
    monkeypatch.setattr(sampling, "trials", lambda *arguments: [providers.Trial(2, names, steps=2)])
    status, result = recorded(tmp_path, "--openai", str(checkout))
    assert status == 0, result["failures"]
    assert [row["provider"] for row in result["rows"]] == list(names) and not result["missing"]
    monkeypatch.setattr(providers, "SIGMA_MIN", 0.5)
    status, result = recorded(tmp_path, "--openai", str(checkout))
    assert status == 1 and "a pixel is off" in result["failures"][0]["reason"]


@pytest.mark.skipif(not has_onednn(torch.bfloat16), reason="this CPU has no convolutions in bfloat16 from oneDNN")
def test_another_dtype(tmp_path, monkeypatch):
    """A trial's own dtype is that of its networks, yardsticks and share of the matrix rate; its name says so."""
    trials = [providers.Trial(2, ("reference", "cmfast"), dtype=dtype) for dtype in ("", "bfloat16")]
    monkeypatch.setattr(sampling, "trials", lambda *arguments: trials)
    status, result = recorded(tmp_path)
    assert status == 0, result["failures"]
    assert [row["dtype"] for row in result["rows"]] == ["float32"] * 2 + ["bfloat16"] * 2
    assert [row["name"].endswith(", bfloat16") for row in result["rows"]] == [False] * 2 + [True] * 2
    assert all(row["percent_of_matrix"] for row in result["rows"])
    (choice,) = [pair for pair in choices.pairs([result]) if pair[0].setting == "bfloat16 for float32"]
    assert [each["trial"] for each in choice[1:]] == [0, 1]


def test_time_limit_is_recorded(tmp_path):
    status, result = recorded(tmp_path, "--seconds", "0", "--compile", "--batches", "1,2")
    assert status == 0 and result["truncated"] and not result["rows"]
    assert len(result["not_started"]) == len(providers.trials("cpu", [1, 2], True))


def test_runs_as_a_module():
    command = [sys.executable, "-m", "cmfast.benchmarks.sampling", "--device", "cpu", "--list"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines() == [str(trial) for trial in providers.trials("cpu", [1, 4], False)]


def test_trials_of_a_gpu():
    """The batches with bars first, quick before slow, and each rival of the bars beside cmfast at every batch."""
    found = providers.trials("cuda", [1, 16, 64, 256], True)
    assert len(set(found)) == len(found)
    assert [t.batch for t in found[:4]] == [1, 256, 1, 256]
    assert all(not set(t.providers) & set(providers.COMPILED) for t in found[:2])
    for rival in ("reference", "openai", "diffusers", "diffusers_compile", "cmfast_compile"):
        assert {t.batch for t in found if {"cmfast", rival} <= set(t.providers)} == {1, 16, 64, 256}
    assert {(t.sampler, t.steps) for t in found} == {
        ("multistep", 1), ("multistep", 2), ("heun", 18), ("forward", 1)
    }
    assert not any(set(t.providers) & set(providers.COMPILED) for t in providers.trials("cuda", [1, 16], False))
    assert providers.trials("cuda", [8], True)[0].batch == 8


def test_every_weight_shows():
    """No layer ends in zeros: each parameter changes the output."""
    network = networks.denoiser("tiny", CPU, torch.float64).network.requires_grad_(True)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = network(x, torch.tensor([1.0, 900.0]), torch.tensor([1, 2]))
    out.square().sum().backward()
    assert 0.1 < out.std() < 10
    assert not [name for name, p in network.named_parameters() if not p.grad.any()]


# Liveness


def test_liveness_by_hand():
    x = torch.zeros(100)
    with Liveness() as live:
        skip = x + 1  # 400 bytes; x is not counted
        h = skip * 2  # 400 more
        h = h[:50] * 3  # 200, in the place of what a view of it was the last to read
        torch.cat([h, skip])  # 200, 400, 600
    assert live.peak() == 1200

    with Liveness() as live:
        ((x + 1) * 2).sub(3)  # each in the place of the one before
    assert live.peak() == 400

    with Liveness() as live:
        torch.cat([x, x])  # 800 that nobody reads
        torch.cat([x, x, x])
    assert live.peak() == 1200

    with Liveness() as live:
        skip = x + 1
        h = skip * 2
        h = torch.cat([h, h])  # 400 of skip, 400 of h, 800 of the result
        torch.cat([h, skip])  # 800, 400, 1200
    assert live.peak() == 2400


def test_memory_that_the_docs_name():
    table = re.findall(r"^\| (ImageNet-64|LSUN-256) \|(.+)\|$", (ROOT / "docs/running.md").read_text(), re.M)
    assert len(table) == 2
    for name, row in table:
        network = name.lower().replace("-", "")
        found = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*(?=[ ,]|$)", row)]
        weights = weight_bytes(network, torch.float32)
        counted = [weights / 4e6, weights / 1e9]
        for training in (False, True):
            counted += [forward_peak(network, 1, t, training) / 1e6 for t in (torch.float32, torch.bfloat16)]
        assert found == pytest.approx(counted, rel=0.02)


def test_liveness_of_a_step():
    """The backward pass needs what the forward pass made: of every layer, not of one."""
    forward, step = (forward_peak("tiny", 4, torch.float32, training) for training in (False, True))
    assert step > 3 * forward and step == pytest.approx(4 * forward_peak("tiny", 1, torch.float32, True), rel=0.03)


def test_liveness_of_networks():
    one, four = (forward_peak("tiny", batch, torch.float32) for batch in (1, 4))
    assert 3.5 * one < four <= 4 * one
    assert forward_peak("tiny", 4, torch.bfloat16) == four // 2
    # The decoder's last block: what it is given, two tensors of 64 channels, and at least one result beside them.
    assert four > 4 * (2 + 1) * 64 * 16 * 16 * 4


# Convolutions


def test_all_convolutions_are_timed():
    """As many as were counted in the original."""
    assert len(convolutions_of("imagenet64", 1)) == 137 and len(convolutions_of("lsun256", 1)) == 138
    network = networks.denoiser("tiny", CPU, torch.float32).network
    seen = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    network(torch.randn(2, 3, 16, 16), torch.ones(2), torch.tensor([1, 2]))
    assert [recorded.shape for recorded in convolutions_of("tiny", 2)] == seen


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
@pytest.mark.parametrize("packed", [True, False])
def test_wrong_convolutions_are_caught(packed):
    network = networks.denoiser("tiny", CPU, torch.float32).network
    alone = Convolutions("tiny", network, 1, packed=packed)
    with torch.no_grad():
        assert alone.wrong() is None
        conv, x, call = alone._steps[-1]
        alone._steps[-1] = conv, x, lambda x: call(x) * 1.001
        assert "is off by" in alone.wrong()


# The original


def test_stand_ins():
    """Attention as the original asks for it is attention of each head."""
    qkv = torch.randn(2, 3 * 4 * 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with _stand_ins(CPU) as names:
        from einops import rearrange
        from flash_attn.flash_attention import FlashAttention

        h = rearrange(qkv, "b (three h d) s -> b s three h d", three=3, h=4)
        made = rearrange(FlashAttention()(h, causal=False)[0], "b s h d -> b (h d) s")
    assert "flash_attn" in names
    q, k, v = qkv.view(2, 3, 4, 8, 5).unbind(1)
    weight = torch.einsum("bhdt,bhds->bhts", q, k).mul(8**-0.5).softmax(-1)
    expected = torch.einsum("bhts,bhds->bhdt", weight, v).reshape(2, 32, 5)
    torch.testing.assert_close(made, expected)
    assert "flash_attn.flash_attention" not in sys.modules


# Bars


def row(provider, batch=1, mode="latency", p50=1.0, trial=0, **more):
    return {
        "name": f"batch {batch}, multistep, 1 step", "trial": trial, "batch": batch, "sampler": "multistep", "steps": 1,
        "provider": provider, "mode": mode, "p50_ms": p50, "times_cmfast": None, "images_per_s": 1e3 * batch / p50,
        **more,
    }  # fmt: skip


def outcomes(device_type, rows):
    result = {"network": "imagenet64", "environment": {"device_type": device_type}, "rows": rows,
              "weight_bytes": 6e8, "liveness_bytes": {"256": 4e9}}
    return sampling_summary.bars(result)


def test_bars_of_a_gpu():
    rows = [
        row("cmfast", p50=1.9, kernels=400), row("cmfast", 256, "throughput", 170.0, 1, peak_bytes=5.6e9),
        row("diffusers_compile", p50=1.8), row("diffusers_compile", 256, "throughput", 180.0, 1),
    ]
    lines = outcomes("cuda", rows)
    assert lines[0].startswith("met: batch 1, one step, at most 2.0 ms (aim 1.0): 1.900")
    assert lines[1].startswith("MISSED: batch 256, one step, at least 1600 images/s (aim 2000): 1506")
    assert lines[2].startswith("MISSED: cmfast at most 3% slower than diffusers_compile: 1.056 (batch 1")
    assert lines[3].startswith("met: cmfast at most 3% slower than diffusers_compile: 0.944 (batch 256")
    assert lines[4].startswith("MISSED: memory at batch 256") and "1.217" in lines[4]
    assert "cmfast 400" in lines[5] and "floor 260" in lines[5]
    rows[0]["p50_ms"], rows[1]["images_per_s"], rows[1]["peak_bytes"] = 2.1, 1700, 5e9
    lines = outcomes("cuda", rows)
    assert [line.split(":")[0] for line in lines] == ["MISSED", "met", "MISSED", "met", "met", lines[5].split(":")[0]]
    assert all(line.startswith("not measured") for line in outcomes("cuda", [])[:-1])


def test_bars_of_a_cpu():
    rows = [
        row("convolutions", p50=100.0), row("cmfast", p50=107.0), row("openai", p50=129.0),
        row("convolutions", 4, p50=100.0, trial=1), row("cmfast", 4, p50=105.0, trial=1),
        row("openai", 4, p50=125.0, trial=1),
        # Another trial: times of one are not set beside those of another.
        row("cmfast", p50=100.0, trial=2), row("cmfast_compile", p50=110.0, trial=2),
        row("openai_compile", p50=109.0, trial=2),
    ]
    starts = [line.split(":")[0] + line.rsplit(":", 1)[1].split(" (")[0] for line in outcomes("cpu", rows)]
    assert starts == ["MISSED 1.070", "met 1.050", "met 1.206", "MISSED 1.190", "MISSED 1.100", "met 1.009"]
    assert all(line.startswith("not measured") for line in outcomes("cpu", []))


def test_no_bars_for_another_network():
    (line,) = sampling_summary.bars({"network": "tiny"})
    assert line.startswith("no bars")


def test_seconds_of_a_gpu_step():
    """What the steps before left over is the sampling benchmark's to use."""
    (step,) = [step for step in gpu.steps(Path("out")) if step.name == "sampling"]
    assert step.command("python3", 400.0)[-2:] == ["--seconds", "370"]
    assert step.command("python3")[-2:] == ["--seconds", str(int(step.seconds * 3 / 4))]
