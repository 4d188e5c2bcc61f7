"""Models, schedules, losses, samplers."""

from tests.faults.ids import loop, loss

PRECONDITIONER = [
    ("EDM with the boundary of a consistency model", "return cls(sigma_data, 0.0)", "return cls(sigma_data)",
     "tests/test_denoiser.py::test_identity_at_the_boundary"),
    ("a model's sigma_min forgotten", "return cls.consistency(sigma_data, sigma_min)",
     "return cls.consistency(sigma_data)", "tests/test_denoiser.py::test_preconditioner_by_name"),
]  # fmt: skip

DENOISER = [
    ("clip forgotten in steps", '"clip": self.clip, "dtype": self.dtype', '"clip": False, "dtype": self.dtype',
     loop("euler.5.plain.bc.clip")),
    ("clip forgotten in D", "sigma, clip=self.clip, **self.scaling", "sigma, clip=False, **self.scaling",
     loop("onestep.40.plain.bc.clip")),
    ("a hooked Denoiser evaluated by its network", " and not _intercepted(model)", "",
     "tests/test_engine_changes.py::test_a_changed_model[eager-hook_the_denoiser]"),
    ("an overridden Denoiser evaluated by its network", " and type(model).forward is Denoiser.forward", "",
     "tests/test_denoiser.py::test_an_overridden_denoiser_is_called_as_a_whole"),
    ("an overridden preconditioner evaluated by its sigma_data", "self.fused = self.fused and not unfused(model)",
     "pass", "tests/test_denoiser.py::TestOverriddenPreconditioner::test_sampling[heun-Timed]"),
    ("an overridden preconditioner not asked by D", "if overridden(self.preconditioner):", "if False:",
     "tests/test_denoiser.py::TestOverriddenPreconditioner::test_denoises_by_them[Karras]"),
    ("a teacher is told what the student made of its time", "_writable(c_noise)\n",
     "c_noise.contiguous()\n", "tests/test_denoiser.py::test_a_network_may_write_into_its_time[network]"),
    ("0 classes are some", "return count if count > 0 else None", "return count",
     "tests/test_denoiser.py::test_classes_that_a_network_states[0-None]"),
    ("0 classes may be asked for", '_check.whole("num_classes", num_classes, least=1)',
     '_check.whole("num_classes", num_classes)', "tests/test_denoiser.py::test_classes_that_a_network_states[0-None]"),
    ("boundary of the default model for all", '"boundary": preconditioner.boundary}', '"boundary": 0.002}',
     loop("euler.5.plain.edm.noclip")),
]  # fmt: skip

SCHEDULES = [
    ("levels evenly spaced", "(high + fraction * (low - high)) ** rho", "(high + fraction * (low - high)) ** 1",
     "tests/test_golden.py::test_karras_sigmas"),
    ("N intervals for N - 1", "index / max(num_scales - 1, 1)", "index / num_scales",
     "tests/test_golden.py::test_karras_sigmas"),
    ("last step not at the grid's end", "round(i * 39 / steps)", "round(i * 40 / steps)",
     "tests/test_schedules.py::test_step_sigmas"),
    ("sigma_down from the level before", "return next_sigma * ratio,", "return sigma * ratio,",
     "tests/test_schedules.py::test_ancestral_levels"),
    ("sigma_up: a square missing", "(1 - ratio**2) ** 0.5", "(1 - ratio) ** 0.5",
     "tests/test_schedules.py::test_ancestral_levels"),
    ("number of scales: end not counted", "((end_scales + 1) ** 2", "(end_scales**2",
     "tests/test_golden.py::test_ema_and_scales"),
    ("progdist: last stages as short as the others", "distill_steps_per_iter * 2", "distill_steps_per_iter",
     "tests/test_schedules.py::test_progdist_halves_then_lingers"),
]  # fmt: skip

TRAINING_LOSSES = [
    ("noise in the dtype of pixels", '    _check.float_tensor("x_start", x_start)\n', "",
     "tests/test_losses.py::test_pixels_are_no_images_yet[given]", 3, 2),
    ("pixels for images", '    _check.float_tensor("x_start", x_start)\n', "",
     "tests/test_losses.py::test_pixels_are_no_images_yet[drawn]", 3, 3),
    ("target at the student's level", "_grid_sigma(indices + 1, num_scales, x_start, levels)",
     "_grid_sigma(indices, num_scales, x_start, levels)", loss("ct.l2.uniform")),
    ("an index beyond the grid drawn", "_draw_indices(indices, num_scales - 1, x_start)",
     "_draw_indices(indices, num_scales, x_start)", loss("ct.l2.uniform", "drawn")),
    ("a teacher's first output that is overwritten", "if overwritten(model_output, next_output):", "if False:",
     "tests/test_losses.py::test_a_teacher_with_one_memory_for_all_outputs"),
    ("solvers swapped", 'if solver == "euler":', 'if solver != "euler":', loss("cd.l2.uniform")),
    ("student's input given to a model of other scalings", "if evaluate.input_options == maker.input_options:",
     "if True:", "tests/test_losses.py::test_a_function_is_as_good_a_model_as_a_denoiser"),
    ("target's input at the student's level", "second, next_sigma))", "second, sigma))",
     "tests/test_losses.py::test_a_function_is_as_good_a_model_as_a_denoiser"),
    ("progressive: N levels, not N intervals", "_grid_sigma(indices + part, num_scales + 1,",
     "_grid_sigma(indices + part, num_scales,", loss("pd.l2.uniform")),
    ("progressive: lerp from the wrong end", "torch.lerp(x_t, x_next, ratio)", "torch.lerp(x_next, x_t, ratio)",
     loss("pd.l2.uniform")),
]  # fmt: skip

DISTANCES = [
    ("target's D by the student's scalings", "target[0].scaling != student.scaling", "False",
     "tests/test_losses.py::test_a_function_is_as_good_a_model_as_a_denoiser"),
    ("huber: c without the root of the dimension", "(x[0].numel() if len(x) else 1) ** 0.5",
     "(x[0].numel() if len(x) else 1)", "tests/test_losses.py::test_huber_c_grows_with_the_image"),
    ("distances [B, 1, 1, 1] times weights [B]", "distances.reshape(len(x)) * weight", "distances * weight",
     "tests/test_losses.py::test_distances_as_of_other_packages[uniform]"),
    ("a mean for distances", "if distances.numel() != len(x):", "if False:",
     "tests/test_losses.py::test_distances_as_of_other_packages[uniform]"),
    ("a weighting's shape is not looked at", "        _check_weight(weight, x)\n        return weight\n",
     "        return weight\n", "tests/test_losses.py::test_weights_that_are_none_of_a_sample[(4, 1)]"),
    ("a weight's shape is not looked at", "        _check_weight(weight, x)\n        distances", "        distances",
     "tests/test_losses.py::test_weights_that_are_none_of_a_sample[(4, 1)]"),
]  # fmt: skip

LEVELS = [
    ("infinite levels", "0 <= level < math.inf", "0 <= level",
     "tests/test_cli.py::test_bad_arguments[--sigmas inf-]"),
]  # fmt: skip

SAMPLERS = [
    ("multistep: noise of the level before", "            sigma[i + 1],\n            take(noise_fn, x),",
     "            sigma[i],\n            take(noise_fn, x),", loop("multistep.40.plain.bc.clip")),
    ("multistep: default sigma_min", "            sigma_min=sigma_min,\n", "",
     "tests/test_samplers.py::test_a_model_brings_its_own_noise_range"),
    ("multistep: sigma_min of another model", "sigma_min = least_sigma(model) if sigma_min is None else sigma_min",
     "sigma_min = 0.002 if sigma_min is None else sigma_min",
     "tests/test_samplers.py::test_noise_ends_at_the_models_sigma_min"),
    ("levels up to infinity", "_is_number(value) and 0 < value < math.inf", "value is not None",
     "tests/test_samplers.py::test_a_range_that_makes_no_levels_is_none"),
    ("churn by too much", "min(s_churn / steps, 2**0.5 - 1)", "s_churn / steps", loop("heun.6.churn.bc.noclip")),
    ("a negative churn is none", "if not s_churn >= 0:", "if False:",
     "tests/compat/test_openai.py::test_errors_name_what_is_wrong[<lambda>-s_churn must be 0, .* or more, got -3.0]"),
    ("churn: a square missing", "max(hat**2 - level**2, 0.0) ** 0.5", "max(hat - level, 0.0) ** 0.5",
     loop("heun.6.churn.bc.noclip")),
    ("churn: s_noise forgotten", "[s_noise * max(hat", "[max(hat", loop("heun.6.churn.bc.noclip")),
    ("churn at every level", "gamma > 0 and bool(low <= np.float32(sigma) <= high)", "gamma > 0",
     "tests/test_samplers.py::test_churn_adds_noise_only_between_its_bounds"),
    ("a first output that is overwritten", "0 != first.data_ptr() == second.data_ptr()", "False",
     "tests/test_samplers.py::test_a_model_with_one_memory_for_all_outputs"),
    ("midpoint of the levels themselves", "((hat ** (1 / 3) + to ** (1 / 3)) / 2) ** 3", "(hat + to) / 2",
     loop("dpm.5.plain.bc.noclip")),
    ("ancestral: a step to the next level", "ops.euler_step(model_output, x, sigma[i], down[i],",
     "ops.euler_step(model_output, x, sigma[i], sigma[i + 1],", loop("ancestral.5.plain.bc.noclip")),
    ("numbers for words", '"bool": ("True or False", lambda value: isinstance(value, bool | np.bool_))',
     '"bool": ("True or False", lambda value: True)',
     "tests/test_cli.py::test_bad_arguments[--option clip_denoised=no-]"),
    ("a truth is a number", " and not isinstance(value, bool)", "",
     "tests/test_samplers.py::test_bad_options[heun-s_churn-True-must be a number]"),
    ("one step of several levels", 'if sampler == "onestep" and len(ts) > 2:', "if False:",
     "tests/test_cli.py::test_bad_arguments[--sampler onestep --ts 0,22,39-]"),
    ("progdist steps to 0", "levels[:-1] if levels[-1] == 0 else levels", "levels",
     loop("progdist.4.plain.edm.clip")),
    ("midpoint ancestral: time not moved", "(times[i] + h / 2) * batch", "times[i] * batch",
     "tests/test_samplers.py::test_midpoint_ancestral_takes_the_time_of_the_midpoint"),
]  # fmt: skip

EXACT = [
    ("means weighted in bfloat16", "        with without_autocast(x.device):\n            mean =",
     "        if True:\n            mean =", "tests/test_exact.py::test_as_exact_under_autocast"),
]  # fmt: skip

EDITING = [
    ("pixels known to the precision of bfloat16", "with without_autocast(coefficients.device):", "if True:",
     "tests/test_editing.py::test_what_is_known_is_kept_under_autocast"),
    ("luminance known to the precision of bfloat16", "with without_autocast(channels.device):", "if True:",
     "tests/test_editing.py::test_what_is_known_is_kept_under_autocast"),
    ("sigma_min of another model", "sigma_min = least_sigma(model) if sigma_min is None else sigma_min",
     "sigma_min = 0.002 if sigma_min is None else sigma_min",
     "tests/test_samplers.py::test_noise_ends_at_the_models_sigma_min"),
    ("black in what is known in part", "edit(model, images, x, sigmas, mask=mask, **options), reference",
     "edit(model, reference, x, sigmas, mask=mask, **options), reference",
     "tests/test_editing.py::test_inpaint_mixes_where_the_mask_is_between"),
    ("the state laid out as what was edited", "torch.empty_like(x).copy_(edited)", "edited",
     "tests/test_editing.py::test_the_state_keeps_its_layout"),
]  # fmt: skip

CHECKPOINT = [
    ("a model that ECT has tuned as a teacher", ' or settings.get("consistency") is True', "",
     "tests/training/test_recipes.py::test_files_of_a_run_say_what_it_makes[ect-consistency]"),
    ("a whole half network loses its kind", 'settings.get("whole") is True', "False",
     "tests/test_checkpoint.py::test_loading_converts_back[dtype0-whole]"),
    ("a half torso for a half network", "all(tensor.dtype == network.dtype for tensor in state.values())", "True",
     "tests/test_checkpoint.py::test_loading_converts_back[dtype0-torso]"),
    ("the width of a head wins over heads that are given", 'if config.get("num_head_channels", -1) != -1 and',
     "if False and",
     "tests/test_checkpoint.py::test_heads_that_are_given_count"),
    ("numbers of heads that said nothing", 'if not name.startswith("num_head")', 'if name != "num_head_channels"',
     "tests/test_checkpoint.py::test_heads_that_are_given_count"),
    ("arguments are not looked at",
     "        config = config | arguments\n        untrusted.check_network(config, len(tensors))\n",
     "        untrusted.check_network(config, len(tensors))\n        config = config | arguments\n",
     "tests/test_checkpoint_errors.py::test_wrong_arguments"),
    ("numbers of NumPy in no file", ", default=_plain_number)", ")", "tests/test_checkpoint.py::test_numbers_of_numpy"),
    ("tied weights are not saved", "if place in places else", "if False else",
     "tests/test_checkpoint.py::test_tied_weights"),
]  # fmt: skip

FAULTS = {
    "cmfast/precondition.py": PRECONDITIONER,
    "cmfast/denoiser.py": DENOISER,
    "cmfast/schedules.py": SCHEDULES,
    "cmfast/distances.py": DISTANCES,
    "cmfast/losses.py": TRAINING_LOSSES,
    "cmfast/levels.py": LEVELS,
    "cmfast/samplers.py": SAMPLERS,
    "cmfast/editing.py": EDITING,
    "cmfast/exact.py": EXACT,
    "cmfast/checkpoint.py": CHECKPOINT,
}
