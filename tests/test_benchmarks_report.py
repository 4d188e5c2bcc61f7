"""One table of all suites, and README's tables: they say what the result files say, and nothing else."""

import copy
import json
from pathlib import Path

import pytest

from cmfast.benchmarks import report
from cmfast.benchmarks.comparisons import agreed, comparisons, counts, text

ROOT = Path(__file__).resolve().parents[1]
RATES = {
    "copy": {"gb_per_s": 10.0}, "what": "3x3 convolution", "matrix": {"float32": {"tflop_per_s": 0.1}}
}  # fmt: skip
PERCENTILES = ("p20", "p50", "p80")
ENVIRONMENT = {
    "device": "CPU: slow", "device_type": "cpu", "gpu": None, "cpu": {"threads": 2}, "torch": "2.14", "triton": "3.8",
    "cuda": None, "python": "3.11", "commit": "abc", "uncommitted_changes": False, "date": "2026-01-02T03:04:05+00:00",
    "command": "python",
}  # fmt: skip


def result(suite, rows, **fields):
    return {
        "schema": 2, "suite": suite, "environment": ENVIRONMENT, "rates": [RATES, RATES], "missing": {},
        "not_started": [], "failures": [], "truncated": False, "rows": rows, **fields,
    }  # fmt: skip


def row(provider, p50, times=None, name="batch 1, multistep, 1 step", **more):
    ratio = None if times is None else {"p20": times - 0.1, "p50": times, "p80": times + 0.1}
    return {
        "trial": 0, "name": name, "provider": provider, "p50_ms": p50, "times_cmfast": ratio, "batch": 1,
        "network": "imagenet64", "sampler": "multistep", "steps": 1, "mode": "latency", "images_per_s": 1e3 / p50,
        **more,
    }  # fmt: skip


@pytest.fixture
def results():
    sampling = [
        row("cmfast", 10.0, 1.0, percent_of_matrix=80.0), row("openai", 20.0, 2.0), row("diffusers", 10.1, 1.01),
        row("inductor", 9.0, 0.9), row("convolutions", 9.0, 0.9), row("cmfast_compile", 8.0, 0.8),
        # Beside nothing of cmfast's: no comparison.
        row("openai", 20.0, None, name="batch 4, multistep, 1 step"),
    ]
    kernels = [
        {"name": "r", "provider": name, "mode": "call", "p50_us": us, "times_cmfast": dict.fromkeys(PERCENTILES, t)}
        for name, us, t in (("auto", 5.0, 1.0), ("inductor", 10.0, 2.0), ("kernel", 1.0, 0.2))
    ]
    return [
        result("sampling", sampling, network="imagenet64", missing={"peer": "not here"}, not_started=["batch 64"],
               failures=[{"trial": "batch 1", "provider": "wrong", "reason": "off by one"}]),
        result("kernels", kernels),
    ]  # fmt: skip


def test_comparisons(results):
    results[0]["rows"].append(row("cmfast", 40.0, 1.0, name="batch 4, multistep, 1 step"))
    found = comparisons(results)
    assert [(c.rival, c.p50, c.verdict) for c in found] == [
        ("inductor", 0.9, "LOSS"), ("diffusers", 1.01, "tie"), ("openai", 2.0, "win"), ("inductor", 2.0, "win")
    ]
    assert counts(found) == "2 wins, 1 tie, 1 loss"
    assert [c.ours_ms for c in found] == [10.0, 10.0, 10.0, 0.005] and found[3].suite == "kernels"
    lines = text(results).splitlines()
    assert "LOSS" in lines[2] and "missing: sampling: peer: not here" in lines
    assert "FAILED, not timed: batch 1: wrong: off by one" in lines
    assert "not started for lack of time: sampling: batch 64" in lines


@pytest.mark.parametrize("same_run", [False, True])
def test_trials_of_one_case_are_told_apart(results, same_run):
    """Times of two trials do not compare: each one's rows stand together, and say whose they are."""
    more = [row("cmfast", 15.0, 1.0, trial=1), row("openai_compile", 30.0, 2.0, trial=1)]
    if same_run:
        results[0]["rows"] += more
    else:
        results.append(result("sampling", [each | {"trial": 0} for each in more]))
    lines = [line.split(" | ")[:3] for line in report.sampling(results)[2:]]
    once = "imagenet64, batch 1, multistep, 1 step"
    second = [[f"| {once}, trial 2", "**cmfast**", "15.0"]]
    second += [[f"| {once}, trial 2", "openai/consistency_models under `torch.compile`", "30.0"]]
    assert [line[0] for line in lines[:6]] == [f"| {once}, trial 1"] * 6
    assert lines[6:] == [*second, ["| imagenet64, batch 4, multistep, 1 step", "openai/consistency_models", "20.0"]]


def test_agreement_of_two_runs(results, tmp_path, capsys):
    again = copy.deepcopy(results)
    again[0]["rows"][1]["times_cmfast"]["p50"] = 2.5
    again[0]["rows"][2]["times_cmfast"]["p50"] = 0.9
    again[1]["rows"].pop(1)
    for folder, run in (("a", results), ("b", again)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "report.json").write_text('{"steps": []}')
        for one in run:
            (tmp_path / folder / f"{one['suite']}.json").write_text(json.dumps(one))
    assert report.main(["--agree", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["25.0%" in lines[0], "12.2%" in lines[1], "0.0%" in lines[2]] == [True] * 3
    assert "openai" in lines[0] and lines[-1] == "2 of 3 ratios within 15%"
    with pytest.raises(ValueError, match="no case and rival in common"):
        agreed(results, [])


def test_a_missing_peer_is_no_win(results):
    for one in results:
        one["rows"] = [r for r in one["rows"] if r["provider"] in ("cmfast", "auto")]
    assert comparisons(results) == [] and "nothing was timed beside cmfast" in text(results)


@pytest.fixture
def folder(tmp_path, results):
    (tmp_path / "results" / "slow").mkdir(parents=True)
    for one in results:
        (tmp_path / "results" / "slow" / f"{one['suite']}.json").write_text(json.dumps(one))
    return tmp_path


def test_tables(folder, capsys):
    pytest.importorskip("matplotlib")
    readme = folder / "README.md"
    readme.write_text("Before.\n\n<!-- benchmarks: sampling -->\nold\n<!-- /benchmarks -->\n\nBetween.\n\n"
                      "<!-- benchmarks: worst -->\n<!-- /benchmarks -->\n")
    arguments = ["--results", str(folder / "results"), "--files", str(readme), "--plots", str(folder / "plots")]
    assert report.main([*arguments, "--check"]) == 1 and "old" in readme.read_text()
    assert report.main(arguments) == 0
    made = readme.read_text()
    assert made.startswith("Before.\n") and "\nBetween.\n" in made and "old" not in made
    assert "| imagenet64, batch 1, multistep, 1 step | **cmfast** | 10.0 | 100 |  | 80% |" in made
    assert "| 20.0 | 50.0 | 2.00 (1.90 to 2.10) |  |" in made
    assert "2 wins, 1 tie, 1 loss" in made and "CPU: slow, 2 threads; torch 2.14, Python 3.11; 2026-01-02." in made
    assert {path.name for path in (folder / "plots").iterdir()} == {"speed-slow.png", "roofline-slow.png"}
    assert report.main([*arguments, "--check"]) == 0
    readme.write_text(made.replace("| 20.0 |", "| 21.0 |"))
    assert report.main([*arguments, "--check"]) == 1
    assert "README.md" in capsys.readouterr().out


def test_what_a_setting_is_worth(results):
    """Two rows of one run that differ in it, per image; of a trial's own pair where a run has several."""
    rows = results[0]["rows"]
    rows += [
        row("cmfast", 22.0, 1.0, name="batch 1, multistep, 2 steps"), {**row("cmfast_compile", 5.0, 0.5), "trial": 7},
        {**row("cmfast", 16.0, name="batch 4, multistep, 1 step"), "batch": 4},
    ]  # fmt: skip
    table = "\n".join(report.choices(results))
    assert "| two steps for one | imagenet64, batch 1, multistep, 1 step | 10.0 | 22.0 | 2.20 |" in table
    assert "| batch 4 for 1 | imagenet64, batch 1, multistep, 1 step | 10.0 | 4 | 0.40 |" in table
    assert "| `compile=True` | imagenet64, batch 1, multistep, 1 step | 10.0 | 8 | 0.80 |" in table
    assert "bfloat16" not in table and table.count("multistep") == 3


def test_who_beats_it_where(results):
    assert report.losses(results)[2:] == [
        "| sampling | plain PyTorch under `torch.compile` | 1 of 1 | 0.90 | 0.90 "
        "| imagenet64, batch 1, multistep, 1 step | 10.0 | 9 |"
    ]


def test_latency_against_batch(results, tmp_path):
    pytest.importorskip("matplotlib")
    from cmfast.benchmarks import plots

    name = "batch 4, multistep, 1 step"
    for provider in ("cmfast", "openai"):
        results[0]["rows"].append(row(provider, 30.0, name=name, batch=4))
    # Of another dtype, and faster: no point of these lines.
    results[0]["rows"].append(row("cmfast", 5.0, name=f"{name}, bfloat16", batch=4))
    assert tmp_path / "latency-slow.png" in plots.draw({"slow": results}, tmp_path)
    figure = pytest.importorskip("matplotlib.figure").Figure()
    assert plots.latency(figure, results)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["cmfast"] == [10.0, 30.0]


def test_what_is_no_result(folder):
    path = folder / "results" / "slow" / "old.json"
    path.write_text(json.dumps({"steps": []}))  # report.json of make gpu
    assert not any("steps" in result for results in report.load(folder / "results").values() for result in results)
    path.write_text(json.dumps({"schema": 1}))
    with pytest.raises(ValueError, match=r"old.json: schema 1, not 2: measure it again"):
        report.load(folder / "results")
    with pytest.raises(ValueError, match="there is no block 'nonsense'; known: sampling"):
        report.written("<!-- benchmarks: nonsense -->\n<!-- /benchmarks -->", {})


def test_the_tables_of_this_repository():
    """Each is what the files in benchmarks/results say: `make report` writes them."""
    devices = report.load(ROOT / "benchmarks" / "results")
    found = 0
    for path in report.FILES:
        text = path.read_text(encoding="utf-8")
        found += len(report.BLOCK.findall(text))
        assert report.written(text, devices) == text, f"{path.name}: run `make report`"
    assert found >= 9


def test_every_number_of_a_result_is_in_a_table(results):
    """Every comparison stands in the long table: none is left out for being a loss."""
    devices = {"slow": results}
    table = report.block("everything", devices)
    assert table.count("| LOSS |") == 1 and table.count("| win |") == 2 and table.count("| tie |") == 1
    changed = copy.deepcopy(devices)
    changed["slow"][0]["rows"][1]["times_cmfast"]["p50"] = 1.5
    assert report.block("everything", changed) != table
