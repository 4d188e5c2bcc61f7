"""Faults of the benchmarks: a number that is not what its table says it is."""

REPORT = "tests/test_benchmarks_report.py::"
BENCH = "tests/test_benchmarks_bench.py::"
SAMPLING = "tests/test_benchmarks_sampling.py::"
CORES = "tests/test_benchmarks_cores.py::"

FAULTS = {
    "benchmarks/comparisons.py": [
        ("a loss called a tie", 'if self.p50 >= 1 / (1 + TIE) else "LOSS"', 'if self.p50 >= 0.5 else "LOSS"',
         REPORT + "test_comparisons"),
        ("the best first", "key=lambda c: c.p50)", "key=lambda c: -c.p50)", REPORT + "test_comparisons"),
        ("a limit called a rival", '"convolutions", "convolutions_unpacked")', '"convolutions_unpacked")',
         REPORT + "test_comparisons"),
        ("a failure kept quiet", "lines += [f\"FAILED, not", "[f\"FAILED, not", REPORT + "test_comparisons"),
        ("beside another case", "return row[\"name\"], row.get(\"trial\"), row.get(\"mode\")",
         "return row.get(\"trial\"), row.get(\"mode\")", REPORT + "test_comparisons"),
    ],
    "benchmarks/report.py": [
        ("--check that checks nothing", "return int(bool(wrong))", "return 0", REPORT + "test_tables"),
        ("old files taken", 'if result.get("schema") != 2:', "if False:", REPORT + "test_what_is_no_result"),
        ("losses left out", "_compared(comparisons(results)), \"\"",
         "_compared(c for c in comparisons(results) if c.verdict != \"LOSS\"), \"\"",
         REPORT + "test_every_number_of_a_result_is_in_a_table"),
        ("trials mixed up by time", "of_case.index(trial), milliseconds(row), row))", "0, milliseconds(row), row))",
         REPORT + "test_trials_of_one_case_are_told_apart[True]"),
    ],
    "benchmarks/plots.py": [
        ("other dtypes in the line", '(row["name"], row["mode"]) == (Trial(row["batch"], ()).name, "latency")',
         'row["name"].startswith(Trial(row["batch"], ()).name)', REPORT + "test_latency_against_batch"),
    ],
    "benchmarks/kernels.py": [
        ("noise of any size", "if value.numel() > FEW and not 0.9 < ratio < 1.1:", "if False:",
         "tests/test_benchmarks.py::test_noise_of_another_generator"),
    ],
    "benchmarks/cases.py": [
        ("an upstream gradient made while it is timed", 't[case.grad_to], t["upstream"])',
         "t[case.grad_to], torch.ones_like(loss))",
         "tests/test_benchmarks.py::test_an_upstream_gradient_is_not_made_while_timed"),
        ("an upstream gradient in another layout", "layout = torch.channels_last if config.channels_last and",
         "layout = torch.channels_last if False and",
         "tests/test_benchmarks.py::test_an_upstream_gradient_is_not_made_while_timed"),
    ],
    "benchmarks/kernels_summary.py": [
        ("large tensors left out beside inductor", '[c for c in images if c.row["largest_tensor_bytes"] > LARGE_BYTES]',
         "[]", "tests/test_benchmarks.py::test_bars"),
        ("a bar that says nothing", "        if not beside:\n", "        if False:\n",
         "tests/test_benchmarks.py::test_bars"),
    ],
    "benchmarks/parameters.py": [
        ("a bar met whatever was measured", "if value >= least else 'MISSED'", "if value else 'MISSED'",
         "tests/test_benchmarks_parameters.py::test_bars_of_a_gpu"),
    ],
    "benchmarks/timing.py": [
        ("ratios the other way round", "ratios = [other / one for other, one in zip(times, ours)]",
         "ratios = [one / other for other, one in zip(times, ours)]",
         "tests/test_benchmarks.py::test_percentiles"),
        ("the slowest called the median", "return ordered[low] + (at - low) * (ordered[high] - ordered[low])",
         "return ordered[-1]", "tests/test_benchmarks.py::test_percentiles"),
        ("a device given up for one call", "    try:\n        torch.cuda.synchronize()\n",
         "    try:\n        raise error\n",
         BENCH + "test_a_device_that_is_lost_ends_a_run[a call failed]"),
        ("a copy timed on an idle GPU", " and time.perf_counter() - begun >= WARM_UP_S[device.type]", "",
         "tests/test_benchmarks.py::test_a_copy_is_timed_on_a_warm_device"),
        ("one that fails is timed on", "                del samples[name]\n", "                pass\n",
         "tests/test_benchmarks.py::test_one_that_fails_while_it_is_timed_is_left_out"),
        ("a round that is late", " or i >= LEAST_ROUNDS and late():", ":",
         BENCH + "test_what_is_there_when_time_is_over_makes_rows"),
        ("no patience", "len(cores.near(apart)) >= rounds[0]", "True",
         CORES + "test_rounds_with_the_cores_apart_do_not_count[apart for a moment]"),
        ("patience without end", " or spent > PATIENCE * budget_s", "",
         CORES + "test_all_count_where_patience_ends[known from before]"),
        ("cores that move within a round", "apart.append(max(before, now))", "apart.append(before)",
         CORES + "test_rounds_with_the_cores_apart_do_not_count[apart for a moment]"),
    ],
    "benchmarks/cores.py": [
        ("every round counts", "near if len(near) >= least else", "",
         CORES + "test_rounds_with_the_cores_apart_do_not_count[side by side at last]"),
        ("too few rounds count", "near if len(near) >= least else", "near or",
         CORES + "test_all_count_where_patience_ends[too few]"),
    ],
    "benchmarks/sampling.py": [
        ("counted before it is timed", "                contenders[name] = contender\n",
         "                contenders[name] = contender\n                timing.count_kernels(models.device, list)\n",
         SAMPLING + "test_kernels_are_counted_when_all_is_timed"),
    ],
    "benchmarks/training.py": [
        ("counted before all is timed", "        timed.append(contender)\n",
         "        timed.append(contender)\n        timing.count_kernels(start.device, lambda: None)\n",
         "tests/test_benchmarks_training.py::test_kernels_are_counted_when_all_is_timed"),
    ],
    "benchmarks/training_gate.py": [
        ("yardsticks made beside the providers", "        for dtype in dtypes:\n", "        for dtype in ():\n",
         "tests/test_benchmarks_training.py::test_yardsticks_are_gone_before_a_provider_is_made"),
    ],
    "benchmarks/training_start.py": [
        ("a yardstick in bfloat16", "            lpips.dtype = dtype  #", "            #",
         "tests/test_benchmarks_training.py::test_the_yardstick_of_lpips_is_not_in_half_precision"),
    ],
    "benchmarks/gpu.py": [
        ("a sanitizer that gives up", '"--launch-timeout", "0", *options', '*options',
         "tests/test_benchmarks.py::TestGpuSteps::test_the_sanitizer_waits_for_pytorch"),
        ("what only a GPU shows comes last", '("every_op", "group_norm", "gpu", "optimizer_gpu")',
         '("every_op", "group_norm", "gpu")',
         "tests/test_benchmarks.py::TestGpuSteps::test_what_only_a_gpu_shows_comes_first"),
        ("kernels that the sanitizer never sees", " or test_norm_of_many_elements or test_sums_of_long_samples or",
         " or",
         "tests/test_benchmarks.py::TestGpuSteps::test_the_sanitizer_sees_every_kernel"),
        ("the profiler stays", '"training": NO_PROFILER', '"training": ()',
         "tests/test_benchmarks.py::TestGpuSteps::test_environments"),
    ],
    "benchmarks/steps.py": [
        ("logs that stay behind", 'archive.add(out, ".")', 'archive.add(out / "report.json", "report.json")',
         "tests/test_benchmarks.py::TestGpuSteps::test_one_failure_stops_nothing[True]"),
    ],
    "benchmarks/environment.py": [
        ("a copy of no commit", 'os.environ.get("CMFAST_COMMIT") or ', "", BENCH + "test_the_commit_of_a_copy"),
    ],
    "benchmarks/bench.py": [
        ("a failure that is no failure", "return int(failed(report))", "return 0",
         BENCH + "test_a_failure_is_the_exit_status"),
        ("an option that --gpu drops", "    if refused:\n", "    if False:\n",
         BENCH + "test_what_a_gpu_run_does_not_take_is_refused"),
        ("results of another run", 'and result["environment"]["date"] >= since', "", BENCH + "test_runs"),
        ("a provider that nobody knows", "if wanted and not known >= set(wanted):", "if False:",
         BENCH + "test_wrong_options"),
    ],
    "benchmarks/startup.py": [
        ("what is wrong is timed", 'if one.get("missing") or one.get("wrong"):', 'if one.get("missing"):',
         BENCH + "test_a_process_that_fails_is_no_number"),
    ],
    "benchmarks/startup_child.py": [
        ("imports left out", '"first_images_s": import_s + make_s', '"first_images_s": make_s', BENCH + "test_startup"),
    ],
    "benchmarks/profile.py": [
        ("gaps under a longer kernel", "if end is None or ended > end:", "if True:", BENCH + "test_gaps"),
    ],
    "benchmarks/providers.py": [
        ("no clipping between steps", ".clamp(-1, 1) + scale * noise(k)", " + scale * noise(k)",
         SAMPLING + "test_two_steps"),
        ("a first step's noise again", "+ scale * noise(k)", "+ scale * noise(0)", SAMPLING + "test_two_steps"),
        ("the level before", "return ops.to_uint8(self._step(x, self._sigmas[-1], labels))",
         "return ops.to_uint8(self._step(x, self._sigmas[0], labels))", SAMPLING + "test_two_steps"),
    ],
    "benchmarks/runs.py": [
        ("a share that is no percentage", 'round(100 * row["gb_per_s"] / copy, 2)', 'round(row["gb_per_s"] / copy, 2)',
         "tests/test_benchmarks_parameters.py::test_every_provider"),
        ("beside the slower copy", 'copy = max(reading["copy"]', 'copy = min(reading["copy"]',
         BENCH + "test_the_faster_reading_counts"),
        ("the first trial's time kept free", "statistics.median(took or [0.0])", "max(took or [0.0])",
         BENCH + "test_a_slow_first_trial_keeps_no_other_from_being_started"),
        ("a provider begun too late", "if made and timing.late() else None", "if False else None",
         BENCH + "test_what_is_there_when_time_is_over_makes_rows"),
        ("kernels counted before rows are written", "                record.write()\n                print(",
         "                print(", BENCH + "test_rows_are_written_before_what_may_crash"),
    ],
}  # fmt: skip
