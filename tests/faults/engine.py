"""The sampling engine."""


GRAPHED = "tests/test_engine_graphs.py::test_"
CHANGED = "tests/test_engine_changes.py::test_"
COMPILED = "tests/test_engine_compile.py::test_"
STRESS = "tests/test_engine_stress.py::test_"
FAILED = "tests/test_engine_failures.py::test_"
COPIED = "tests/test_engine_copies.py::test_"

GRAPHS = [
    ("a broken capture goes on for PyTorch", "            self._mend(graph, generators)\n", "",
     GRAPHED + "how_a_real_space_calls_torch"),
    ("the pool of a broken capture is used again",
     "        self.pool = torch.cuda.graph_pool_handle()\n        graph =", "        graph =",
     GRAPHED + "how_a_real_space_calls_torch"),
    ("numbers of float32", "isinstance(value, int) else torch.float64, device=device)",
     "isinstance(value, int) else torch.float32, device=device)", STRESS + "levels_of_float64[True]"),
    ("numbers are filled in once", "elif value != self._filled.get(name):", "elif name not in self._filled:",
     GRAPHED + "a_graph_makes_the_same_bits[3]"),
    ("tensors are not filled in", "                buffer.copy_(value)\n", "                pass\n",
     GRAPHED + "generate_from_given_noise[3-None]"),
    ("seeds of more than 63 bits", "_signed(value) if isinstance(value, int) else value", "value",
     GRAPHED + "a_graph_makes_the_same_bits[3]"),
    ("levels are made anew", "            with keep_levels(self._levels):\n                return loop(dict(",
     "            if True:\n                return loop(dict(", GRAPHED + "a_graph_makes_the_same_bits[3]"),
    ("warm-up moves a generator on", "                generator.set_state(state)\n", "                pass\n",
     GRAPHED + "noise_from_a_generator[3]"),
    ("generators are not registered", "_captured(function, space, model, generators)",
     "_captured(function, space, model, ())", GRAPHED + "noise_from_a_generator[3]"),
    ("strides are no part of a kind", "return value.shape, value.stride(), value.dtype, value.device",
     "return value.dtype, value.device", GRAPHED + "denoise_takes_every_shape"),
    ("the program used last goes", "self._programs.popitem(last=False)", "self._programs.popitem(last=True)",
     GRAPHED + "the_cache_has_a_bound"),
    ("use does not keep a program", "            self._programs.move_to_end(key)\n", "            pass\n",
     GRAPHED + "the_cache_has_a_bound"),
    ("what broke a capture is not looked for", "                broken = error.__context__",
     "                broken = error", GRAPHED + "a_broken_capture_names_the_module"),
    ("a module that is left counts as running", "        running.pop()\n", "        pass\n",
     GRAPHED + "a_capture_that_breaks_outside_of_modules"),
]  # fmt: skip

RUNNER = [
    ("TF32 asked by its old name", "        torch.backends.cuda.matmul.fp32_precision,\n",
     "        torch.get_float32_matmul_precision(),\n", STRESS + "tf32_by_its_new_name"),
    ("moved weights are no reason to capture anew", "if change in (Change.STORAGE, Change.STRUCTURE):",
     "if change is Change.STRUCTURE:", CHANGED + "a_changed_model[graph-swap_storage]"),
    ("derived weights stay as they were", "        self._refresh_derived(force=False)\n", "",
     CHANGED + "derived_weights[True-False]"),
    ("graphs read derived weights that were replaced", "        if replaced:\n", "        if False:\n",
     CHANGED + "derived_weights[True-True]"),
    ("what a refresh writes counts as a change", "        self._watch.settle()\n        if replaced:",
     "        if replaced:", CHANGED + "derived_weights[True-False]"),
    ("a network's own attributes count as changes", "                self._watch.settle()\n",
     "                pass\n",
     CHANGED + "attributes_that_a_network_writes_itself_are_its_own"),
    ("hooks are passed over", "self.model if self._hooked() else self._prepared.model", "self._prepared.model",
     COMPILED + "hooks_are_called_all_the_same[True]"),
    ("graphs of models with hooks", "return self._hooked() or self._unseen() or self._broken",
     "return self._unseen() or self._broken", CHANGED + "a_changed_model[graph-hook]"),
    ("a broken capture is tried again", "                self._broken = str(error)\n", "",
     GRAPHED + "a_broken_capture_names_the_module"),
    ("a graph of any backend", "        ops.current_backend(),\n", "", GRAPHED + "a_backend_is_captured_for_itself"),
    ("graphs under autocast", "if torch.is_autocast_enabled(device.type):", "if False:",
     GRAPHED + "no_graph_under_autocast"),
    ("buffers of an inference mode", "with torch.inference_mode(False), self._graph_space().turn():",
     "with self._graph_space().turn():", GRAPHED + "inference_mode"),
    ("a graph that was asked for is not had", "                elif self._cuda_graph is True:\n",
     "                elif False:\n", GRAPHED + "generate_from_functions_and_draws_runs_eagerly"),
    ("a model in training mode", "with self._evaluating(), torch.no_grad():", "with torch.no_grad():",
     CHANGED + "a_changed_model[eager-train]"),
    ("an update that failed is forgotten", "change = max(self._due, self._watch.change(",
     "change = max(Change.NOTHING, self._watch.change(", FAILED + "what_cannot_be_had_any_more[dtype]"),
    ("kinds of calls add up", "            if len(self._ran) >= KINDS:\n", "            if False:\n",
     STRESS + "kinds_of_calls_are_forgotten"),
    ("locks of another process's threads",
     "runner._lock, runner._due, runner._forked = threading.RLock(),", "runner._due, runner._due, runner._forked = 0,",
     COPIED + "a_fork_while_a_thread_samples[graph]"),
    ("spaces of another process's threads", "            runner._space = None\n", "            pass\n",
     COPIED + "a_fork_while_a_thread_samples[graph]"),
    ("forked processes wait for threads", "        if torch.get_num_threads() > 1:\n", "        if False:\n",
     COPIED + "what_a_forked_process_cannot_do[threads]"),
    ("forked processes use the GPU", 'if self.device.type == "cuda":', "if False:",
     COPIED + "what_a_forked_process_cannot_do[cuda]"),
    ("a copy forgets its options", "**own, **self._options}", "**own}", COPIED + "samplers[bfloat16-deepcopy]"),
    ("a graph of any generator", "_settings(device), *map(id, generators)", "_settings(device)",
     STRESS + "another_generator"),
]  # fmt: skip

WATCH = [
    ("addresses come back", " or any(map(_gone, self._storages)):", ":",
     STRESS + "memory_that_comes_back[None-True]"),
    ("pointers are not compared", "if list(map(Tensor.data_ptr, self._tensors)) != self._pointers or", "if",
     STRESS + "swapped_weights_that_are_kept"),
    ("members are not compared",
     "if not all(map(is_, chain.from_iterable(map(dict.values, self._parts)), self._members)):", "if False:",
     CHANGED + "what_changed"),
    ("containers that were empty", "if any(self._empty) or list(", "if list(",
     CHANGED + "what_counts_as_another_structure[child]"),
    ("classes are not compared", "getattr(cls, name) is body for", "True for",
     CHANGED + "what_counts_as_another_structure[class]"),
    ("a cast is a move", "return Change.STRUCTURE if cast else Change.STORAGE", "return Change.STORAGE",
     CHANGED + "what_counts_as_another_structure[half]"),
    ("methods of torch's own modules", " or self._torchs_sizes() != self._torchs", "", CHANGED + "what_changed"),
    ("whatever is at that place", "self._own = {(module, name) for module, name in self._own if module in present}",
     "self._own = {(module, name) for module in present for _, name in self._own}",
     CHANGED + "what_a_module_writes_stays_that_modules"),
    ("the first to leave restores", "                if not _held[module]:\n", "                if True:\n",
     CHANGED + "evaluating_is_exact_and_counts"),
    ("all in training mode after", "if module in _held or module.training]", "if True]",
     CHANGED + "a_changed_model[eager-train_a_part]"),
]  # fmt: skip

NETWORKS = [
    ("torch.compile gives up at eight", "    with torch._dynamo.config.patch(limits):\n", "    if True:\n",
     COMPILED + "the_blocks_of_a_network"),
    ("a copy's children are the original's", "copy.__dict__[\"_modules\"] = dict(module._modules)", "pass",
     COMPILED + "a_copy_shares_the_weights"),
    ("dtype without an optimised network", "    if own != dtype:\n", "    if False:\n",
     COMPILED + "dtype_goes_to_what_optimises"),
]  # fmt: skip

TRANSFER = [
    ("the host's memory is handed out", "return self.staged.clone()", "return self.staged",
     "tests/test_engine.py::test_batches_are_handed_out_one_later_where_copies_travel"),
]  # fmt: skip

MEMORY = [
    ("one image more than fits", "    return fits\n", "    return too_large\n",
     "tests/test_engine.py::test_a_batch_that_does_not_fit[5]"),
    ("messages of allocators", "any(part in str(error) for part in _MESSAGES)", "False",
     "tests/test_engine.py::test_a_batch_that_does_not_fit[0]"),
]  # fmt: skip

ENGINE = [
    ("classes are cut to whole numbers", "if labels.numel() and (labels.is_floating_point() or", "if (False and",
     "tests/test_engine.py::test_classes_are_whole_numbers"),
    ("a network is taken for a model", "        check_model(model)\n        shape", "        shape",
     "tests/test_engine.py::test_a_bare_network_is_no_model[sampler]"),
    ("a graph of any settings", "return self.sampler, tuple(self.sigmas), self.image_shape, *options", "return ()",
     STRESS + "settings_that_change[sigmas-value0]"),
    ("levels of float32 for all", "wide = _check.sigma_dtype(x)", "wide = torch.float32",
     STRESS + "levels_of_float64[True]"),
    ("a batch that fails has drawn", "            self._put_back(state)\n            if not out_of_memory",
     "            if not out_of_memory", FAILED + "a_network_that_fails[eager-generator]"),
    ("the search for a size has drawn", "        self._put_back(state)\n        self._runner.forget()",
     "        self._runner.forget()", FAILED + "a_batch_that_does_not_fit_draws_nothing"),
    ("a noise_fn is passed over", 'values.get("labels"), own or counter,', 'values.get("labels"), counter,',
     FAILED + "what_is_called_between_steps[noise_fn]"),
    ("the tail's labels", "labels[-1:].expand(-n % size)", "labels[:1].expand(0)",
     "tests/test_engine.py::test_tail_is_bit_equal_at_one_batch_size"),
    ("a batch is handed out at once", "if len(copies) > copies.ahead:", "if len(copies):",
     "tests/test_engine.py::test_batches_are_handed_out_one_later_where_copies_travel"),
    ("noise that is left over", "            given.check_used()\n", "",
     GRAPHED + "noise_of_the_wrong_number[3-2 are drawn]"),
]  # fmt: skip

SHARDING = [
    ("batches in a row", "starts[group.rank :: group.size], n, labels", "starts[group.rank :], n, labels",
     "tests/test_sharding.py::test_any_number_of_ranks[7-2]"),
]  # fmt: skip

RANKS = [
    ("the other ranks wait", "failed = torch.tensor([int(failure is not None)])", "failed = torch.tensor([0])",
     "tests/test_sharding.py::test_a_rank_that_fails_later[1]"),
]  # fmt: skip

FAULTS = {
    "cmfast/graphs.py": GRAPHS,
    "cmfast/runner.py": RUNNER,
    "cmfast/watch.py": WATCH,
    "cmfast/networks.py": NETWORKS,
    "cmfast/transfer.py": TRANSFER,
    "cmfast/memory.py": MEMORY,
    "cmfast/engine.py": ENGINE,
    "cmfast/sharding.py": SHARDING,
    "cmfast/ranks.py": RANKS,
}
