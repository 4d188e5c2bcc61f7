"""The benchmark of averages and optimizers: it runs, refuses what is wrong, and says what its bars say."""

import json

import pytest

from cmfast.benchmarks import parameters, perceptual, timing
from cmfast.benchmarks.networks import NETWORKS

RATES = {"copy": {"gb_per_s": 10.0}, "what": "convolution", "matrix": {"float32": {"tflop_per_s": 1.0}}}
HERE = ["--device", "cpu", "--providers", "loop,foreach,cmfast"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(parameters.SIZES, "6M", {**NETWORKS["tiny"], "model_channels": 32})
    monkeypatch.setattr(parameters, "TRIALS", {"cpu": [("averages", "6M", 4), ("radam", "6M", 2)]})
    monkeypatch.setitem(parameters.BUDGET_S, "cpu", 0.01)
    monkeypatch.setattr(timing, "rates", lambda *_: RATES)


def test_every_provider(tmp_path, capsys):
    assert parameters.main([*HERE, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("parameters-*.json")
    result = json.loads(path.read_text())
    assert [(row["operation"], row["provider"]) for row in result["rows"]] == [
        (operation, provider) for operation in ("averages", "radam") for provider in ("loop", "foreach", "cmfast")
    ]
    for row, per_parameter in zip(result["rows"][::3], (4 + 8 * 4, 7 * 4 + 8 * 2 + 4)):
        assert row["floor_bytes"] == per_parameter * row["parameters"]
        assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_s"] / RATES["copy"]["gb_per_s"], abs=0.01)
    printed = capsys.readouterr().out
    assert printed.count("x cmfast") == 6
    assert parameters.main(["--report", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed


@pytest.mark.parametrize("operation", ["averages", "radam"])
def test_a_wrong_provider_is_not_timed(operation, tmp_path, monkeypatch, capsys):
    def wrong(state):
        right = parameters._foreach(state)
        return lambda: (right(), state.averages[1][3].detach().mul_(1.001))

    monkeypatch.setitem(parameters.PROVIDERS[operation], "foreach", wrong)
    assert parameters.main([*HERE, "--only", operation, "--out", str(tmp_path)]) == 1
    assert f"FAILED, not timed: {operation} 6M" in capsys.readouterr().out


def test_one_that_fails_while_it_is_timed(tmp_path, monkeypatch, capsys):
    """The others have their rows all the same."""
    monkeypatch.setattr(timing, "SLICE_S", 1e-4)

    def fails(state):
        right, calls = parameters._foreach(state), iter(range(parameters.GATE_STEPS))
        return lambda: (next(calls), right())

    monkeypatch.setitem(parameters.PROVIDERS["averages"], "foreach", fails)
    assert parameters.main([*HERE, "--only", "averages", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("parameters-*.json")
    result = json.loads(path.read_text())
    assert [row["provider"] for row in result["rows"]] == ["loop", "cmfast"]
    assert [(f["provider"], f["reason"]) for f in result["failures"]] == [("foreach", "StopIteration: ")]


def test_bars_of_a_gpu(monkeypatch):
    row = {"operation": "averages", "size": "296M", "averages": 4, "gb_per_s": 2000.0}
    rows = [
        {**row, "provider": "cmfast", "p50_us": 5000.0, "percent_of_copy": 91.0, "times_cmfast": {"p50": 1.0}},
        {**row, "provider": "foreach", "p50_us": 7000.0, "percent_of_copy": 60.0, "times_cmfast": {"p50": 1.4}},
    ]
    monkeypatch.setattr(parameters.runs, "about", lambda result: [])

    def lines(rows, device_type="cuda"):
        result = {"rows": rows, "failures": [], "missing": {}, "truncated": False}
        return parameters.text(result | {"environment": {"device_type": device_type}}).splitlines()[-2:]

    of_copy, of_foreach = "at least 90% of the copy bandwidth", "at least 1.25 times as fast as foreach"
    assert lines(rows) == [f"met: averages 296M {of_copy}: 91.00", f"met: averages 296M {of_foreach}: 1.40"]
    # cmfast again, beside inductor: not the round that foreach was in.
    assert lines([*rows, {**rows[0], "percent_of_copy": 80.0}])[0].startswith("met")
    rows[0]["percent_of_copy"], rows[1]["times_cmfast"] = 89.0, {"p50": 1.2}
    assert lines(rows) == [f"MISSED: averages 296M {of_copy}: 89.00", f"MISSED: averages 296M {of_foreach}: 1.20"]
    rows[1]["times_cmfast"] = None
    assert lines(rows[1:]) == [f"not measured: averages 296M {of_copy}", f"not measured: averages 296M {of_foreach}"]
    assert lines([]) == lines(rows[1:])
    assert not any("296M " in line and "bandwidth" in line for line in lines(rows, "cpu"))


@pytest.mark.parametrize("suite", [parameters.SUITE, perceptual.SUITE], ids=lambda suite: suite.name)
def test_what_compiles_on_a_gpu_comes_last(suite, monkeypatch):
    """In trials of its own, and not at all where nobody wants it."""
    monkeypatch.undo()
    compiled = ["inductor" in t.providers for t in suite.chosen(suite.arguments(["--device", "cuda"]))]
    assert compiled == sorted(compiled) and any(compiled) and not all(compiled)
    plain = suite.chosen(suite.arguments(["--device", "cuda", "--no-compile"]))
    assert len(plain) == compiled.count(False) and not any("inductor" in t.providers for t in plain)


def test_sizes():
    """What the names say."""
    from cmfast.checkpoint import meta_network

    for name, low, high in (("32M", 28e6, 36e6), ("296M", 295e6, 297e6)):
        assert low < sum(p.numel() for p in meta_network(parameters.SIZES[name]).parameters()) < high


def test_time_limit(tmp_path):
    assert parameters.main([*HERE, "--seconds", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["truncated"] and len(result["not_started"]) == 2 and not result["rows"]
