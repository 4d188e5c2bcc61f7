"""The benchmarks run without a GPU, on small sizes, and time nothing that is wrong."""

import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import cmfast
from cmfast import ops, reference
from cmfast.benchmarks import cases, gpu, kernels, kernels_summary, perceptual, steps, timing
from cmfast.perceptual import LPIPS

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(timing, "SLICE_S", 1e-4)
    monkeypatch.setattr(kernels, "QUICK_S", 0.01)
    monkeypatch.setattr(kernels, "configs", lambda *arguments: cases.smallest())


def recorded(folder, *options):
    status = kernels.main(["--device", "cpu", "--quick", "--out", str(folder), *options])
    (path,) = folder.glob("*.json")
    return status, json.loads(path.read_text())


def test_quick_run_has_all_providers(tmp_path, capsys):
    """Inductor among them, where there is a compiler."""
    status, result = recorded(tmp_path, "--only", "to_uint8 2x")
    assert status == 0 and not result["failures"] and not result["truncated"]
    assert result["environment"]["device_type"] == "cpu" and "CPU" in result["about"]
    assert "--quick" in result["environment"]["command"] and str(tmp_path) not in json.dumps(result)
    compiled = [] if kernels.inductor_refusal(CPU) else ["inductor"]
    # Two cases are called so: to_uint8, and denoise_to_uint8.
    assert [row["provider"] for row in result["rows"]] == 2 * ["reference", *compiled, "cmfast"]
    for row in result["rows"]:
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["floor_bytes"] == 2 * 3 * 32 * 32 * (5 if row["case"] == "to_uint8" else 7)
    assert "of the reference's time" in capsys.readouterr().out


def test_every_case_is_right(tmp_path):
    status, result = recorded(tmp_path, "--providers", "reference,cmfast")
    assert status == 0, result["failures"]
    assert {row["case"] for row in result["rows"]} == set(cases.CASES)


def test_every_fused_operation_has_a_case():
    called = set()

    class Recorder:
        def __getattr__(self, name):
            called.add(name)
            return getattr(reference, name)

    for config in cases.smallest():
        (inputs,) = cases.make_inputs(config, 1, CPU, 0)
        cases.operation(config, Recorder())(inputs)
    # Those over a model's parameters: benchmarks/parameters.py.
    assert set(ops.FUSED) - called == {"ema_update_", "grad_norm", "radam_ema_", "adam_ema_"}


def test_an_upstream_gradient_is_not_made_while_timed():
    """Filling one would be counted as time of the operation's, and not in its floor. It lies as maps do."""
    with_gradients = [config for config in cases.smallest() if cases.CASES[config.case].grad_to]
    assert len(with_gradients) > 5
    for config in with_gradients:
        (t,) = cases.make_inputs(config, 1, CPU, 0)
        with patch.object(torch, "ones_like", side_effect=AssertionError("made while it is timed")):
            cases.run(cases.CASES[config.case], cases.operation(config, reference), t)
        if config.channels_last and t["upstream"].ndim == 4:
            assert t["upstream"].is_contiguous(memory_format=torch.channels_last), config


@pytest.mark.parametrize("case, scale, right", [
    ("renoise drawn", 1.0, True), ("renoise drawn", 3.0, False),
    # Its noise levels are drawn too: any size is right, but no NaN.
    ("draw_pair drawn", 1.0, True), ("draw_pair drawn", float("nan"), False),
])  # fmt: skip
def test_noise_of_another_generator(tmp_path, monkeypatch, case, scale, right):
    def make(config):
        plain = cases.operation(config, reference)
        return lambda t: plain({**t, "noise": scale * torch.randn(len(t["index"]), *config.shape)})

    monkeypatch.setitem(kernels.PROVIDERS, "inductor_randn", kernels.Provider(make, "reference", other_noise=True))
    monkeypatch.setattr(kernels, "inductor_refusal", lambda device: None)
    (config,) = (c for c in cases.smallest() if c.case == case)
    monkeypatch.setattr(kernels, "configs", lambda *arguments: [config])
    for _ in range(3 if right else 1):
        status, result = recorded(tmp_path, "--providers", "reference,inductor_randn")
        assert status == (not right) and len(result["rows"]) == 1 + right, result["failures"]


@pytest.mark.parametrize("fault", ["a part in a thousand", "NaN", "one element", "a raised error", "dtype"])
def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, fault, capsys):
    def make(config):
        right = cases.operation(config)

        def wrong(t):
            value = right(t)
            if fault == "a part in a thousand":
                return value * 1.001
            if fault == "NaN":
                return value * float("nan")
            if fault == "one element":
                value[-1, -1, -1, -1] += 1
                return value
            if fault == "dtype":
                return value.bfloat16()
            raise RuntimeError("this one does not run")

        return wrong

    monkeypatch.setitem(kernels.PROVIDERS, "cmfast", kernels.Provider(make, "auto"))
    status, result = recorded(tmp_path, "--only", "denoise 2x", "--providers", "reference,cmfast")
    assert status == 1
    assert [row["provider"] for row in result["rows"]] == ["reference"]
    assert [failure["provider"] for failure in result["failures"]] == ["cmfast"]
    assert "FAILED, not timed: denoise" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def make(config):
        right = cases.operation(config)
        return lambda t: right({**t, "x": Doubled.apply(t["x"])})

    monkeypatch.setitem(kernels.PROVIDERS, "cmfast", kernels.Provider(make, "auto"))
    status, result = recorded(tmp_path, "--only", "l2 + backward", "--providers", "reference,cmfast")
    assert status == 1 and "result 1" in result["failures"][0]["reason"]


def test_a_wrong_baseline_is_caught_too(tmp_path, monkeypatch):
    denoise = cmfast.ops.denoise
    monkeypatch.setattr(cmfast.ops, "denoise", lambda *args, **options: denoise(*args, **options) + 0.01)
    status, result = recorded(tmp_path, "--only", "denoise 2x", "--providers", "reference")
    assert status == 1 and not result["rows"]


def test_time_limit_is_recorded(tmp_path):
    status, result = recorded(tmp_path, "--seconds", "0", "--providers", "reference")
    assert status == 0 and result["truncated"] and len(result["not_started"]) == len(cases.CASES)


def test_runs_as_a_module():
    command = [sys.executable, "-m", "cmfast.benchmarks.kernels", "--device", "cpu", "--list"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert len(run.stdout.splitlines()) == len(cases.configs("cpu"))


def test_through_pytest_benchmark(tmp_path):
    """With its histogram, for which it wants another package."""
    pytest.importorskip("pytest_benchmark")
    one = "to_uint8 and not denoise and 1x3x32x32 and reference"
    words = ["benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", one]
    # pytest-benchmark measures nothing in a worker of xdist, which this test may be in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words, f"--benchmark-histogram={tmp_path / 'made'}"],
        cwd=ROOT, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout + run.stderr
    (path,) = tmp_path.glob("made-*.svg")
    assert "to_uint8" in path.name


def test_perceptual(tmp_path, monkeypatch):
    """With a small trunk: right providers are timed, one that is off is not, one that is missing is no failure."""
    pytest.importorskip("torchvision")

    def absent(model):
        raise perceptual.Missing("not here")

    class Small(LPIPS):
        def forward(self, x, target):
            return super().forward(x, target, resize=False)

    monkeypatch.setattr(perceptual, "make", functools.cache(lambda *_: Small("alex", pretrained=False)))
    monkeypatch.setattr(perceptual, "BUDGET_S", {"cpu": 0.01})
    monkeypatch.setitem(perceptual.PROVIDERS, "piq", (absent, False))
    options = ["--device", "cpu", "--batch", "1", "--out", str(tmp_path)]
    assert perceptual.main([*options, "--providers", "piq,reference,cmfast"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert [row["provider"] for row in json.loads(path.read_text())["rows"]] == ["reference", "cmfast"]
    off = (lambda model: lambda x, y: 1.01 * model(x, y), True)
    monkeypatch.setitem(perceptual.PROVIDERS, "cmfast", off)
    assert perceptual.main([*options, "--providers", "cmfast"]) == 1
    result = json.loads(path.read_text())
    assert not result["rows"] and result["failures"][0]["reason"].startswith("distance: relative error 0.01")


def test_percentiles():
    assert timing.percentile([5.0, 1.0, 3.0, 2.0, 4.0], 50) == 3.0 and timing.percentile([1.0, 2.0], 20) == 1.2
    assert timing.times_of([4.0, 9.0, 5.0], [2.0, 3.0, 2.0]) == {"p20": 2.2, "p50": 2.5, "p80": 2.8}
    assert timing.times_of([1.0], None) is None


def fails_from(count, call):
    """The same, but out of memory from a call on: one that the gate and the first calls do not see."""
    calls = itertools.count()

    def fails(*arguments):
        if next(calls) >= count:
            raise torch.OutOfMemoryError("this many bytes")
        return call(*arguments)

    return fails


def test_one_that_fails_while_it_is_timed_is_left_out():
    """The others are timed in every round, and the ratio of none shifts by one."""
    counters = {name: itertools.count(start) for name, start in (("a", 0), ("b", 100), ("c", 200))}
    slices = {name: functools.partial(next, counter) for name, counter in counters.items()}
    slices["b"] = fails_from(3, slices["b"])
    samples, broken = timing.interleave(slices, 0.0, (5, 1000))
    assert samples == {"a": list(range(5)), "c": list(range(200, 205))}
    assert broken == {"b": "OutOfMemoryError: this many bytes"}


@pytest.mark.parametrize("count", [2, 8], ids=["in the first calls", "in a round"])
def test_one_that_fails_takes_no_other_with_it(tmp_path, monkeypatch, count):
    def make(config):
        return fails_from(count, cases.operation(config))

    monkeypatch.setitem(kernels.PROVIDERS, "reference", kernels.Provider(make, "reference"))
    status, result = recorded(tmp_path, "--only", "denoise 2x", "--providers", "reference,cmfast")
    assert status == 1 and [row["provider"] for row in result["rows"]] == ["cmfast"]
    assert [(f["provider"], f["reason"]) for f in result["failures"]] == [
        ("reference (call)", "OutOfMemoryError: this many bytes")
    ]


def test_a_copy_is_timed_on_a_warm_device(monkeypatch):
    """One whose clock rises under load: no reading is of the slow copies before."""
    now = [0.0]

    def stopwatch(work):
        taken = 0.02 if now[0] < 0.2 else 0.001
        now[0] += taken
        return taken

    monkeypatch.setattr(timing, "Stopwatch", lambda device: stopwatch)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setitem(timing.WARM_UP_S, "cpu", timing.WARM_UP_S["cuda"])
    found = timing.copy_bandwidth(CPU)
    assert found["gb_per_s_p20"] == found["gb_per_s"] == round(2 * 2**26 / 0.001 / 1e9, 2)


def test_configurations_of_a_gpu():
    chosen = cases.configs("cuda")
    assert len(set(chosen)) == len(chosen)
    images = {((3, 64, 64), 1), ((3, 64, 64), 64), ((3, 64, 64), 256), ((3, 256, 256), 256)}
    for name, case in cases.CASES.items():
        assert set(case.sizes or images) <= {(c.shape, c.batch) for c in chosen if c.case == name}
    first = chosen[: len(cases.OVERVIEW)]
    assert [c.case for c in first] == list(cases.OVERVIEW)
    assert all(c.elements * 4 > kernels_summary.LARGE_BYTES for c in first if c.shape[0] == 3)


def test_bars(tmp_path):
    """From made-up rows: only what is below a bar, or slower than a baseline, is MISSED."""
    def beside(us, rival_us):
        return {"p50_us": rival_us, "times_cmfast": dict.fromkeys(("p20", "p50", "p80"), rival_us / us)}

    row = {
        "name": "one", "case": "denoise", "shape": [3, 64, 64], "batch": 64,
        "state_dtype": "float32", "model_dtype": "bfloat16",
        "channels_last": False, "mode": "graph", "times_cmfast": None,
        "largest_tensor_bytes": 10, "percent_of_copy": 50.0, "p50_us": 1.0,
    }
    large = row | {"name": "large", "shape": [3, 256, 256], "batch": 256, "largest_tensor_bytes": 2e8}
    rows = [
        row | {"provider": "cmfast"},
        row | {"provider": "inductor"} | beside(1.0, 0.9),
        large | {"provider": "inductor"} | beside(1.0, 0.98),
        large | {"provider": "cmfast", "percent_of_copy": 93.0},
        large | {"name": "noise", "provider": "cmfast", "case": "renoise drawn", "percent_of_copy": 84.0},
    ]
    norm = row | {"name": "norm", "case": "group_norm_silu", "shape": [192, 64, 64], "percent_of_copy": 79.0,
                  "largest_tensor_bytes": 33e6}  # fmt: skip
    rows += [norm | {"provider": "cmfast"}, norm | {"provider": "inductor"} | beside(1.1, 1.0)]
    lpips = norm | {"name": "lpips", "case": "lpips_layer + backward"}
    rows += [lpips | {"provider": "cmfast"}, lpips | {"provider": "reference"} | beside(1.0, 5.5)]
    result = {"suite": "kernels", "environment": {"device_type": "cuda"}, "rows": rows}
    lines = kernels_summary.bars(result)
    assert any(line.startswith("met: denoise 256x3x256x256") for line in lines)
    assert any(line.startswith("MISSED: renoise drawn") for line in lines)
    slower = "MISSED: at most 3% slower than inductor at 3x64x64, graph mode: 0 of 1"
    assert any(line.startswith(slower) for line in lines)
    assert "met: at most 3% slower than inductor on tensors > 100 MB, graph mode: 1 of 1" in lines
    assert "not measured: at most 3% slower than inductor on tensors > 100 MB, call mode: 0 of 0" in lines
    assert any(line.startswith("not measured: euler_step") for line in lines)
    assert any(line.startswith("MISSED: group_norm_silu 64x192x64x64") for line in lines)
    assert any(line.startswith("MISSED: at most 3% slower than inductor on maps, graph mode: 0 of 1") for line in lines)
    assert any(line.startswith("not measured: group_norm_silu on chip, tensors > 32 MB") for line in lines)
    assert any(line.startswith("met: lpips_layer + backward") and "5.5 times" in line for line in lines)
    rows[2] |= beside(1.0, 0.9)
    slower = "MISSED: at most 3% slower than inductor on tensors > 100 MB, graph mode: 0 of 1\n    denoise 256x3x256"
    assert any(line.startswith(slower) for line in kernels_summary.bars(result))
    lines = kernels_summary.bars(result | {"rows": []})
    assert all(line.startswith("not measured: ") for line in lines)
    assert "not measured: lpips_layer + backward beside the reference, tensors > 32 MB" in lines
    result["environment"]["device_type"] = "cpu"
    assert kernels_summary.bars(result) == ["met: at most 1.05 of the reference's time: 1 of 1"]
    rows[-1]["times_cmfast"]["p50"] = 0.95
    assert kernels_summary.bars(result)[0].startswith("MISSED: at most 1.05 of the reference's time: 0 of 1\n")


class TestGpuSteps:
    @pytest.mark.parametrize("long", [False, True])
    def test_dry(self, long, capsys):
        assert gpu.main(["--dry", *(["--long"] if long else [])]) == 0
        out = capsys.readouterr().out
        names = ("environment", "smoke", "sampling", "training", "kernels", "parameters", "memcheck", "profile")
        others = ("doubling", "perceptual", "startup", "compiled", "all-tests", "racecheck")
        for name in (*names, *(others if long else ())):
            assert f"\n{name} " in f"\n{out}"
        assert long or sum(step.seconds for step in gpu.steps(Path("out"))) <= gpu.TOTAL_S <= 530

    def test_a_run_in_the_background_stops_its_steps(self, tmp_path):
        """There a shell has interrupts ignored."""
        hangs = gpu.Step("hangs", ["-c", "import time; print('begun'); time.sleep(60)"], 1)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            entry = steps.run(hangs, sys.executable, tmp_path, 1)
        finally:
            signal.signal(signal.SIGINT, before)
        assert entry["status"] == "timeout" and entry["seconds"] < 1 + steps.GRACE_S
        assert "KeyboardInterrupt" in entry["tail"]

    @pytest.mark.parametrize("pack", [False, True])
    def test_one_failure_stops_nothing(self, tmp_path, monkeypatch, pack):
        steps = [
            gpu.Step("fails", ["-c", "print('this is why'); raise SystemExit(3)"], 5),
            gpu.Step("hangs", ["-c", "import time; print('begun'); time.sleep(60)"], 1),
            gpu.Step("misses", ["-c", ""], 10, missing=lambda: "no such tool"),
            gpu.Step("works", ["-c", "import cmfast; print('done')"], 5),
        ]
        monkeypatch.setattr(gpu, "steps", lambda out, long: steps)
        assert gpu.main(["--out", str(tmp_path), "--seconds", "7", *(["--pack"] if pack else [])]) == 1
        if pack:
            assert {path.name for path in tmp_path.iterdir()} == {"report.json", "gpu.tar.gz"}
            with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
                assert archive.extractfile("./report.json").read() == (tmp_path / "report.json").read_bytes()
                archive.extractall(tmp_path, filter="data")
        report = json.loads((tmp_path / "report.json").read_text())["steps"]
        assert [step["status"] for step in report] == ["failed", "timeout", "missing", "ok"]
        assert "this is why" in report[0]["tail"] and report[0]["exit_code"] == 3
        assert "begun" in (tmp_path / "hangs.log").read_text() and report[1]["seconds"] < 8
        assert report[2]["reason"] == "no such tool"

    @pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
    def test_what_failed_is_said_at_once(self, tmp_path, workers):
        (tmp_path / "test_hangs.py").write_text(
            "import time\ndef test_fails(): assert 1 + 1 == 3, 'this is why'\ndef test_hangs(): time.sleep(600)\n"
        )
        words = ["-m", "pytest", str(tmp_path), "-q", "-p", "no:cacheprovider", "-p", "tests.at_once", *workers]
        with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert any("this is why" in line for line in process.stdout)
                assert process.poll() is None
            finally:
                process.kill()

    def test_what_only_a_gpu_shows_comes_first(self):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*gpu.py")}
        assert files == set(gpu.FIRST[2:5]) and all(f"or {Path(name).stem}" in gpu.SMOKE for name in files)

    def test_the_sanitizer_sees_every_kernel(self):
        """Those that the tests chosen for it launch: in the interpreter, with kernels that do nothing, which is quick.

        Some tests fail by that, but at their ends.
        """
        pytest.importorskip("triton")
        program = (
            "import sys, pytest, torch\n"
            "from triton.runtime.interpreter import InterpretedFunction as Kernel\n"
            "launched = set()\n"
            "Kernel.__getitem__ = lambda kernel, grid: launched.add(kernel.fn.__name__) or (lambda *a, **k: None)\n"
            "torch.equal = lambda a, b: True\n"
            "pytest.main(sys.argv[1:])\n"
            "print(*launched)\n"
        )
        words = [*gpu.SANITIZED_FILES, "-q", "--tb=no", "-p", "no:cacheprovider", "-k", gpu.SANITIZED]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
        text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py"))
        kernels = set(re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE))
        assert len(kernels) > 30
        assert kernels <= set(run.stdout.splitlines()[-1].split())

    def test_the_sanitizer_waits_for_pytorch(self):
        """Until its first call of CUDA; and what libraries ask in vain is no error of a kernel."""
        wrappers = {step.name: step.wrapper for step in gpu.steps(Path("out"), long=True) if step.wrapper}
        assert set(wrappers) == {"memcheck", "racecheck"}
        for words in wrappers.values():
            assert words[words.index("--launch-timeout") + 1] == "0"
        assert wrappers["memcheck"][-2:] == ("--report-api-errors", "no")
        assert "--report-api-errors" not in wrappers["racecheck"]

    def test_environments(self):
        """Kernels are counted by a profiler, which is to be gone when the next trial is timed."""
        environments = {step.name: dict(step.environment) for step in gpu.steps(Path("out"), long=True)}
        counting = {name for name, each in environments.items() if each.get("TEARDOWN_CUPTI") == "1"}
        assert counting == {"sampling", "training"}
        assert environments["smoke"] == environments["kernels"] == {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def test_chosen_tests(self):
        """The names are those of tests that are there."""
        for name in gpu.SANITIZED_FILES:
            assert (ROOT / name).is_file()
        text = "".join(gpu.SANITIZED_FILES) + "".join((ROOT / name).read_text() for name in gpu.SANITIZED_FILES)
        for part in re.findall(r"\w+", f"{gpu.SMOKE} {gpu.SANITIZED} {gpu.REDUCTIONS}"):
            assert part in text, part
