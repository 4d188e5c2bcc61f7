"""`python -m cmfast bench`, start-up and profiles: they run on tiny networks, and count nothing that is wrong."""

import dataclasses
import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cmfast import cli
from cmfast.benchmarks import bench, environment, gpu, profile, providers, report, runs, startup, steps, timing
from cmfast.benchmarks.suites import SUITES

RATES = {"copy": {"gb_per_s": 10.0}, "what": "convolution", "matrix": {"float32": {"tflop_per_s": 1.0}}}


def test_every_suite_has_its_time():
    assert set(bench.SECONDS) == set(SUITES)
    assert sum(full for full, _ in bench.SECONDS.values()) <= 600
    assert sum(quick for _, quick in bench.SECONDS.values()) <= 120


def test_list(capsys):
    assert cli.main(["bench", "--list", "--quick", "--device", "cpu", "--provider", "foreach,cmfast"]) == 0
    lines = capsys.readouterr().out.splitlines()
    suites = {"sampling", "training", "kernels", "parameters", "doubling", "startup"}
    assert {line.split()[0] for line in lines} == suites
    assert cli.main(["bench", "--list", "--quick", "--device", "cpu", "--case", "parameters averages"]) == 0
    assert capsys.readouterr().out == "parameters averages 6M 2\n"


def test_wrong_options(capsys):
    assert cli.main(["bench", "--list", "--provider", "cmfast,openia"]) == 2
    assert "unknown openia; known: auto, cmfast" in capsys.readouterr().err
    assert cli.main(["bench", "--quick", "--device", "cpu", "--case", "no such case"]) == 2
    assert "--list prints them" in capsys.readouterr().err


def test_runs(tmp_path, capsys):
    """A suite in a process of its own; all that was measured in one file, and one table."""
    # What an earlier run left is not of this one.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "parameters-old.json").write_text(
        json.dumps({"suite": "parameters", "environment": {"date": "2020-01-01T00:00:00+00:00"}})
    )
    arguments = ["bench", "--quick", "--device", "cpu", "--case", "averages 6M", "--provider", "foreach,cmfast"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "all" / "all.json")]) == 0
    made = json.loads((tmp_path / "all" / "all.json").read_text())
    assert list(made["results"]) == ["parameters"] and [step["status"] for step in made["steps"]] == ["ok"]
    rows = made["results"]["parameters"]["rows"]
    assert [row["provider"] for row in rows] == ["foreach", "cmfast"] and rows[0]["percent_of_copy"] > 0
    out = capsys.readouterr().out
    assert "parameters averages 6M 2  foreach" in out and "(ties within 3%)" in out


def test_a_failure_is_the_exit_status(tmp_path, monkeypatch):
    failing = {"steps": [{"step": "parameters", "status": "failed"}], "date": "2026-01-01T00:00:00+00:00"}
    monkeypatch.setattr(steps, "run_all", lambda *arguments: failing)
    arguments = ["bench", "--quick", "--device", "cpu", "--case", "averages 6M", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1


def test_gpu(capsys):
    assert cli.main(["bench", "--gpu", "--list"]) == 0
    out = capsys.readouterr().out
    assert "compute-sanitizer" in out and "cmfast.benchmarks.profile" in out


@pytest.mark.parametrize(
    "words", ["--quick", "--provider cmfast", "--device cpu", "--compile", "--no-compile"], ids=str.split
)
def test_what_a_gpu_run_does_not_take_is_refused(words, capsys, monkeypatch):
    """Nothing is left out without a word."""
    monkeypatch.setattr(gpu, "main", lambda words: 0)
    assert cli.main(["bench", "--gpu", *words.split()]) == 2
    name = words.removesuffix(" cmfast")
    assert f"--gpu takes no {name}: what its steps measure is fixed" in capsys.readouterr().err


def test_all_of_a_gpu_run_in_one_file(tmp_path, monkeypatch):
    program = """
import json, sys
about = {"suite": "kernels", "environment": {"date": "2999-01-01T00:00:00+00:00"}, "rows": [1]}
open(sys.argv[1], "w").write(json.dumps(about))
"""
    out = tmp_path / "out"
    made = [gpu.Step("kernels", ["-c", program, str(out / "kernels-GPU.json")], 60), gpu.Step("smoke", ["-c", ""], 60)]
    monkeypatch.setattr(gpu, "steps", lambda out, long: made)
    arguments = ["bench", "--gpu", "--device", "cuda", "--out", str(out), "--json", str(tmp_path / "all" / "all.json")]
    assert cli.main(arguments) == 0
    found = json.loads((tmp_path / "all" / "all.json").read_text())
    assert [step["status"] for step in found["steps"]] == ["ok", "ok"]
    assert {name: result["rows"] for name, result in found["results"].items()} == {"kernels": [1]}


def recorded(suite, folder, monkeypatch, *options):
    monkeypatch.setattr(timing, "rates", lambda *arguments: RATES)
    status = suite.main(["--device", "cpu", "--network", "tiny", "--out", str(folder), *options])
    (path,) = folder.glob("*.json")
    return status, json.loads(path.read_text())


def test_startup(tmp_path, monkeypatch, capsys):
    """In a new process, through the gate; one that is missing is named."""
    status, result = recorded(
        startup.SUITE, tmp_path, monkeypatch, "--providers", "reference,openai,cmfast", "--rounds", "1"
    )
    assert status == 0, result["failures"]
    assert [row["provider"] for row in result["rows"]] == ["reference", "cmfast"]
    assert "--openai" in result["missing"]["openai"]
    for row in result["rows"]:
        assert row["p50_ms"] == pytest.approx(1e3 * (row["import_s"] + row["make_s"]), abs=2)
        assert 0 < row["call_s"] < row["make_s"]
        if row["peak_bytes"] is not None and row["provider"] == "cmfast":
            assert row["peak_bytes"] > row["weight_bytes"] > 0
    assert "s to the first images" in capsys.readouterr().out


def test_a_process_that_fails_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "child", lambda trial, name, *rest: {"wrong": "relative error 1"})
    status, result = recorded(startup.SUITE, tmp_path / "out", monkeypatch, "--providers", "cmfast")
    assert status == 1 and not result["rows"] and result["failures"][0]["reason"] == "relative error 1"


def test_a_child_that_dies_says_why(tmp_path):
    options = startup.SUITE.arguments(["--device", "cpu"])
    trial = startup.Trial("no-such-network", 1, ("cmfast",))
    with pytest.raises(RuntimeError, match="no-such-network"):
        startup.child(trial, "cmfast", options, torch.device("cpu"))


@pytest.mark.parametrize(("name", "finds"), [("cmfast", [[]]), ("cmfast_again", [[], ["made"]])])
def test_a_second_process_finds_what_compilers_made(name, finds, monkeypatch):
    found = []

    def run(command, env, **options):
        assert command[command.index("--provider") + 1] == "cmfast"
        caches = [Path(env[cache]) for cache in startup.CACHES]
        found.append(sorted({file.name for cache in caches for file in cache.glob("*")}))
        for cache in caches:
            cache.mkdir(exist_ok=True)
            (cache / "made").touch()
        return subprocess.CompletedProcess(command, 0, json.dumps({"begun": float(command[-1])}), "")

    monkeypatch.setattr(subprocess, "run", run)
    before, options = time.time(), startup.SUITE.arguments(["--device", "cpu"])
    said = startup.child(startup.Trial("tiny", 1, (name,)), name, options, torch.device("cpu"))
    assert found == finds and before <= said["begun"] <= time.time()


def test_what_compiles_starts_apart():
    options = startup.SUITE.arguments(["--device", "cpu", "--compile"])
    plain, slow = startup.SUITE.chosen(options)
    assert not set(plain.providers) & set(providers.COMPILED) and slow.providers[0] == "cmfast"
    assert set(slow.providers[1:]) <= set(providers.COMPILED)


def test_profile(tmp_path, monkeypatch, capsys):
    status, result = recorded(profile.SUITE, tmp_path, monkeypatch, "--quick", "--providers", "cmfast")
    assert status == 0, result["failures"]
    assert [row["batch"] for row in result["rows"]] == [1, 0]
    for row in result["rows"]:
        assert sum(kernel["share"] for kernel in row["kernels"]) == pytest.approx(1, abs=0.2)
        assert any("conv" in kernel["name"] for kernel in row["kernels"])
    assert "training step" in capsys.readouterr().out


def test_gaps():
    """Of overlapping kernels the later end counts."""
    found = profile.kernels([("a", 0, 10), ("b", 2, 4), ("c", 12, 13), ("a", 20, 21)])
    assert found["idle_us"] == 9 and [gap["us"] for gap in found["gaps"]] == [7, 2]
    assert found["gaps"][1] == {"us": 2, "after": "a", "before": "c"}
    assert found["kernels"][0] == {"name": "a", "calls": 2, "us": 11, "share": 0.7857}


def test_rows_say_of_which_trial_they_are(tmp_path, monkeypatch, capsys):
    """cmfast is in each of several trials of one case, and only those of one trial were taken in turn."""
    monkeypatch.setattr(timing, "rates", lambda *arguments: RATES)
    trials = [startup.Trial("tiny", 1, (name, "cmfast")) for name in ("reference", "openai")]
    monkeypatch.setattr(startup, "child", lambda trial, *rest: {
        "first_images_s": 1.0, "import_s": 0.9, "make_s": 0.1, "call_s": 0.05, "dtype": "float32",
        "peak_bytes": None, "weight_bytes": 8, "note": None,
    })  # fmt: skip
    suite = dataclasses.replace(startup.SUITE, trials=lambda *arguments: trials)
    assert suite.main(["--device", "cpu", "--out", str(tmp_path), "--rounds", "1"]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [(row["trial"], row["provider"]) for row in result["rows"]] == [
        (0, "reference"), (0, "cmfast"), (1, "openai"), (1, "cmfast"),
    ]  # fmt: skip
    cases = [line.split("|")[1].strip() for line in report.startup([result])[2:]]
    assert sorted(cases) == [f"tiny, batch 1, first images, trial {n}" for n in (1, 1, 2, 2)]


def test_what_would_be_cut_off_is_not_started(tmp_path, monkeypatch, capsys):
    """Longer than what is left, by the longest trial so far."""
    monkeypatch.setattr(timing, "rates", lambda *arguments: RATES)

    def measure(trial, number):
        time.sleep(0.4)
        return {"rows": [], "failures": [], "missing": {}}

    trials = [startup.Trial("tiny", batch, ("cmfast",)) for batch in (1, 2)]
    suite = dataclasses.replace(
        startup.SUITE, trials=lambda *arguments: trials, start=lambda *arguments: ({}, measure)
    )
    assert suite.main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.7"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["not_started"] == [str(trials[1])]


def test_a_slow_first_trial_keeps_no_other_from_being_started(tmp_path, monkeypatch, capsys):
    """It starts compilers; as long as that is not what each of the others takes."""
    now = [0.0]
    monkeypatch.setattr(timing, "rates", lambda *arguments: RATES)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def measure(trial, number):
        now[0] += 4 if number else 18
        return {"rows": [], "failures": [], "missing": {}}

    trials = [startup.Trial("tiny", batch, ("cmfast",)) for batch in range(20)]
    suite = dataclasses.replace(
        startup.SUITE, trials=lambda *arguments: trials, start=lambda *arguments: ({}, measure)
    )
    assert suite.main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "63"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["not_started"] == [str(trial) for trial in trials[12:]]


def test_the_faster_reading_counts(tmp_path, monkeypatch):
    """A share of what the device can do is not the larger for a reading that was slow."""
    def reading(copy, product):
        return RATES | {"copy": {"gb_per_s": copy}, "matrix": {"float32": {"tflop_per_s": product}}}

    readings = iter([reading(10.0, 4.0), reading(20.0, 2.0)])
    monkeypatch.setattr(timing, "rates", lambda *arguments: next(readings))
    row = {"provider": "cmfast", "gb_per_s": 10.0, "tflop_per_s": 1.0, "dtype": "float32"}
    suite = dataclasses.replace(
        startup.SUITE, trials=lambda *arguments: [startup.Trial("tiny", 1, ("cmfast",))],
        start=lambda *arguments: ({}, lambda trial, number: {"rows": [row], "failures": [], "missing": {}}),
        line=lambda *arguments: "", text=lambda result: "",
    )  # fmt: skip
    assert suite.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    (made,) = json.loads(path.read_text())["rows"]
    assert (made["percent_of_copy"], made["percent_of_matrix"]) == (50.0, 25.0)
    assert runs.rated({"tflop_per_s": 1.0, "dtype": "float16"}, [RATES, RATES])["percent_of_matrix"] is None


def of_providers(made):
    """A way to measure, as suites do, that makes one provider after the other; the second is slow."""
    def measure(trial, number):
        found = {"rows": [], "failures": [], "missing": {}}
        for name in trial.providers:
            reason = runs.left_out(made)
            if reason:
                found["missing"][name] = reason
                continue
            made.append(name)
            time.sleep(0.6 * (len(made) == 2))
        samples, _ = timing.interleave({name: lambda: 1.0 for name in made}, 60.0)
        found["rows"] = [{"provider": name, **timing.statistics_ms(times)} for name, times in samples.items()]
        return found

    return measure


def test_what_is_there_when_time_is_over_makes_rows(tmp_path, monkeypatch):
    """In the middle of a trial: no third provider is begun, and two are timed for a few rounds."""
    monkeypatch.setattr(timing, "rates", lambda *arguments: RATES)
    trial = startup.Trial("tiny", 1, ("reference", "cmfast", "openai"))
    suite = dataclasses.replace(
        startup.SUITE, trials=lambda *arguments: [trial], start=lambda *arguments: ({}, of_providers([])),
        line=lambda *arguments: "", text=lambda result: "",
    )  # fmt: skip
    assert suite.main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.5"]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [(row["provider"], row["samples"]) for row in result["rows"]] == [("reference", 3), ("cmfast", 3)]
    assert result["missing"] == {"openai": "no time was left for it"}
    assert not timing.late()


@pytest.mark.parametrize("gone", [False, True], ids=["a call failed", "the device is gone"])
def test_a_device_that_is_lost_ends_a_run(tmp_path, monkeypatch, gone):
    """And one that answers does not, whatever became of a call."""
    monkeypatch.setattr(timing, "rates", lambda *arguments: RATES)
    error = torch.AcceleratorError("this is why")

    def synchronize():
        if gone:
            raise error

    def measure(trial, number):
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    trials = [startup.Trial("tiny", batch, ("cmfast",)) for batch in (1, 2)]
    suite = dataclasses.replace(
        startup.SUITE, trials=lambda *arguments: trials, start=lambda *arguments: ({}, measure)
    )
    words = ["--device", "cpu", "--out", str(tmp_path)]
    if gone:
        with pytest.raises(torch.AcceleratorError):
            suite.main(words)
    else:
        assert suite.main(words) == 1
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert len(result["failures"]) == (1 if gone else 2) and "this is why" in result["failures"][0]["reason"]
    assert result["not_started"] == ([str(trials[1])] if gone else [])


@pytest.mark.parametrize("gone", [False, True], ids=["a profiler failed", "the device is gone"])
def test_rows_are_written_before_what_may_crash(tmp_path, monkeypatch, gone):
    """And what fails there is missing, which the times beside it are not."""
    monkeypatch.setattr(timing, "rates", lambda *arguments: RATES)
    monkeypatch.setattr(timing, "lost", lambda error: gone)
    seen = []

    def written():
        (path,) = tmp_path.glob("*.json")
        return json.loads(path.read_text())

    def fails():
        seen.append([(row["trial"], row["provider"]) for row in written()["rows"]])
        raise torch.AcceleratorError("this is why")

    def measure(trial, number):
        later = [("cmfast", "kernels", fails), ("openai", "kernels", lambda: 7)]
        rows = [{"provider": name, "kernels": None} for name in ("cmfast", "openai")]
        return {"rows": rows, "failures": [], "missing": {}, "later": later}

    trials = [startup.Trial("tiny", batch, ("cmfast",)) for batch in (1, 2)]
    suite = dataclasses.replace(
        startup.SUITE, trials=lambda *arguments: trials, start=lambda *arguments: ({}, measure),
        line=lambda *arguments: "", text=lambda result: "",
    )  # fmt: skip
    if gone:
        with pytest.raises(torch.AcceleratorError):
            suite.main(["--device", "cpu", "--out", str(tmp_path)])
    else:
        assert suite.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
        assert written()["missing"] == {"kernels of cmfast": "AcceleratorError: this is why"}
    assert seen[0] == [(0, "cmfast"), (0, "openai")] and seen[-1][-1] == (0 if gone else 1, "openai")
    assert [row["kernels"] for row in written()["rows"]] == ([None, None] if gone else [None, 7, None, 7])
    assert written()["not_started"] == ([str(trials[1])] if gone else [])


def test_startup_on_a_gpu_takes_each_process_once(monkeypatch):
    began = []

    def child(trial, name, *rest):
        began.append(name)
        return {"missing": "not here"}

    monkeypatch.setattr(startup, "child", child)
    options = startup.SUITE.arguments(["--device", "cuda"])
    startup.measure(startup.Trial("tiny", 1, ("cmfast", "reference")), options, torch.device("cuda"))
    assert began == ["cmfast", "reference"]


def test_the_commit_of_a_copy(monkeypatch):
    """Without a .git beside it."""
    monkeypatch.setenv("CMFAST_COMMIT", "0123abc")
    assert environment.environment("cpu")["commit"] == "0123abc"
