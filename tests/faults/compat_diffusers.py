"""What stands in for diffusers."""

CONVERTED = "tests/compat/test_diffusers_convert.py::test_"
SCHEDULED = "tests/compat/test_diffusers_scheduler.py::test_"
ACCELERATED = "tests/compat/test_diffusers_pipeline.py::test_"
OBSTACLES = "tests/compat/test_diffusers_obstacles.py::test_"
DIFFUSERS = "cmfast/compat/diffusers/"

DIFFUSERS_CONFIG = [
    ("the middle attention without normalisation", "in ((32,) if scale_shift else (None, 32)):", "in (None, 32):",
     CONVERTED + "what_cannot_be_converted_from[attn_norm_num_groups-1]"),
    ("unknown options are passed over", 'not key.startswith("_") and value:', 'not key.startswith("_") and False:',
     CONVERTED + "what_cannot_be_converted_from[learned_skip-]"),
    ("a head of one width at every level", "for width in attended}\n    if len(dims) == 1:",
     "for width in attended}\n    if dims:", CONVERTED + "what_cannot_be_converted_to[num_head_channels-1]"),
    ("a width that rounds down", "if int(multiple * base) == width else", "if True else",
     CONVERTED + "every_width_is_met"),
]  # fmt: skip

DIFFUSERS_CONVERT = [
    ("keys before queries", '("to_q", "to_k", "to_v")', '("to_k", "to_q", "to_v")',
     CONVERTED + "same_outputs_and_back[imagenet-like]"),
    ("upsampling beside attention", 'f"output_blocks.{index}.{1 + attends}"', 'f"output_blocks.{index}.1"',
     CONVERTED + "same_outputs_and_back[imagenet-like]"),
    ("weights are shared", "{name: tensor.clone() for name, tensor in state.items()}, assign", "state, assign",
     CONVERTED + "converted_weights_are_copies"),
    ("left-over weights", '("not expected", state.keys() - wanted)', '("not expected", set())',
     CONVERTED + "weights_that_do_not_fit"),
]  # fmt: skip

DIFFUSERS_SCHEDULER = [
    ("timesteps are looked up by value", "if timestep.untyped_storage()._cdata == schedule.untyped_storage()._cdata:",
     "if False:", SCHEDULED + "nothing_is_read_on_the_host[2]"),
    ("a sample that was changed", "ready[1:3] == (sample._version, self.step_index)",
     "ready[2] == self.step_index",
     SCHEDULED + "the_fused_input_is_used_once_and_only_for_an_unchanged_sample"),
    ("the input of another level", "ready[1:3] == (sample._version, self.step_index)", "ready[1] == sample._version",
     SCHEDULED + "the_input_of_another_level_than_the_next[None]"),
    ("another sample", "ready[0] is sample and ready[1:3] == (sample._version, self.step_index)", "True",
     SCHEDULED + "the_fused_input_is_used_once_and_only_for_an_unchanged_sample"),
    ("the input of a level that s_noise made", "if config.s_noise == 1 and not", "if not",
     SCHEDULED + "same_numbers_of_other_configurations[s_noise]"),
    ("s_noise once", "math.sqrt(scale**2 * (sigma", "math.sqrt(scale * (sigma",
     SCHEDULED + "same_numbers_of_other_configurations[s_noise]"),
    ("no noise drawn at the last step", "if len(self.timesteps) > 1:", "if following < count - 1:",
     ACCELERATED + "callbacks_leave_generators_in_step"),
    ("a step of the wider dtype", "torch.promote_types(sample.dtype, model_output.dtype)", "sample.dtype",
     SCHEDULED + "mixed_dtypes"),
    ("saved under this module's name", "CMStochasticIterativeScheduler.__module__ = _Base.__module__\n", "",
     SCHEDULED + "saved_as_diffusers_own"),
    ("levels that were written in place", "or version != seen[1] ", "",
     SCHEDULED + "levels_that_change_on_the_way[step-item]"),
    ("a timestep beside a part of the schedule", "if 0 <= index < len(schedule) and not between:",
     "if 0 <= index < len(schedule):", SCHEDULED + "a_timestep_beside_a_part_of_the_schedule[slice(None, None, 2)-1]"),
    ("a subclass is lost", "None if kind is CMStochasticIterativeScheduler else kind", "None",
     SCHEDULED + "copies_of_a_subclass_are_of_it[deepcopy]"),
    ("no noise at the last step, whatever its level", "self._levels[following] <= np.float32(config.sigma_min):",
     "following == count - 1:", SCHEDULED + "levels_that_end_elsewhere[[80.0, 20.0, 5.0, 2.0, 1.0]]"),
    ("scalings of its own are passed over", 'if replaced(self, "get_scalings_for_boundary_condition"):', "if False:",
     SCHEDULED + "scalings_of_its_own[overridden]"),
    ("a method that wraps diffusers'", 'getattr(getattr(type(scheduler), name), "__globals__", {}).get("__name__")',
     "getattr(type(scheduler), name).__module__",
     OBSTACLES + "replaced_methods_of_the_scheduler[diffusers' class-step]"),
    ("methods set on the scheduler", "if name in vars(scheduler) or written", "if written",
     OBSTACLES + "replaced_methods_of_the_scheduler[after-step]"),
    ("begin_index in the middle", "self.begin_index if self.step_index is None else self.step_index]",
     "self.begin_index]", SCHEDULED + "add_noise[fp32]"),
]  # fmt: skip

DIFFUSERS_PIPELINE = [
    ("one draw too few", "for _ in levels]", "for _ in levels[1:]]",
     ACCELERATED + "same_images[as given-conditional-two]"),
    ("labels before latents", "        sample = self.prepare_latents(\n",
     "        torch.randint(0, 2, (1,))\n        sample = self.prepare_latents(\n",
     ACCELERATED + "same_images[as given-conditional-one]"),
    ("x_T of the first level, not of sigma_max", "sample.to(wide) / levels[0]",
     "sample.to(wide) / self.scheduler.init_noise_sigma",
     ACCELERATED + "same_images[as given-conditional-[30, 12, 5]]"),
    ("s_noise forgotten", "z if s_noise == 1 else s_noise * z", "z", ACCELERATED + "settings_of_the_scheduler[noise]"),
    ("pixels cut off", '"nearest" if', '"trunc" if', ACCELERATED + "output_types[3-pil]"),
    ("replaced methods are passed over", "        if method:\n", "        if False:\n",
     OBSTACLES + "replaced_methods_of_the_scheduler[after-step]"),
    ("a class that was changed is taken for ours", " and not replaced(pipe.scheduler):", ":",
     OBSTACLES + "replaced_methods_of_the_scheduler[diffusers' class-step]"),
    ("refresh of samplers alone", "if self.reason is None and network.refresh(force=True):", "if False:",
     ACCELERATED + "refresh[optimised-graph-circular]"),
    ("refresh leaves the other schedules' graphs", "self._samplers.clear()  # one", "pass  # one",
     ACCELERATED + "refresh[optimised-graph-circular]"),
    ("refresh of an engine does nothing", "            self._engine.refresh()\n", "            pass\n",
     ACCELERATED + "refresh[optimised-eager-merged]"),
    ("offloading is passed over", 'if any("_hf_hook" in vars(m) or', "if any(",
     OBSTACLES + "what_is_in_the_way_is_said"),
    ("dropout of the configuration alone", "if dropout.drops(parts):",
     "if self.unet.training and self.unet.config.dropout > 0:", OBSTACLES + "dropout_that_is_on[layers alone]"),
    ("labels of any kind are classes", "if self.unet.config.class_embed_type is not None:", "if False:",
     OBSTACLES + "labels_that_are_no_classes[identity-whole]"),
    ("parts are looked at once", "self.reason or refusal(self.network)", "self.reason",
     OBSTACLES + "hooks_on_parts_come_and_go[after]"),
    ("refused once is refused for ever", "elif engine.reason and engine.reason !=", "elif False and engine.reason !=",
     OBSTACLES + "parts_of_another_kind_come_and_go[before accelerate]"),
    ("another network", "engine.unet is not unet or", "", ACCELERATED + "changes_are_seen[as given]"),
    ("another scheduler", " or engine.config != config", "",
     ACCELERATED + "changes_are_seen[as given]"),
    ("a forward pass that came later", " or engine.passes != _passes(unet)", "",
     OBSTACLES + "a_forward_pass_of_the_networks_own"),
    ("settings of register_to_config", "fast.scheduler = like(pipe.scheduler)",
     "fast.scheduler = CMStochasticIterativeScheduler.from_config(pipe.scheduler.config)",
     ACCELERATED + "settings_of_register_to_config_are_kept[accelerate]"),
    ("images made in a way of their own", " and not self._makes_images", "",
     OBSTACLES + "images_made_in_a_way_of_their_own[subclass-numpy_to_pil]"),
    ("labels of two kinds", "labels = labels.to(torch.int64)\n", "pass\n",
     ACCELERATED + "it_runs_as_one_graph[as given]"),
    ("another network halfway", "if self.unet is not unet:", "if False:",
     ACCELERATED + "a_callback_may_put_another_network_in[optimised]"),
    ("every callback", "if i % callback_steps == 0:", "if True:", ACCELERATED + "callbacks[as given]"),
]  # fmt: skip

DIFFUSERS_NETWORK = [
    ("float32 of every folder", "dtype = _dtype_of(unet_folder)", "dtype = None",
     "tests/compat/test_diffusers.py::test_diffusers_folders_of_another_dtype[torch.float16-one file]"),
    ("the dtype of a variant", "if re.fullmatch(", "if re.match(",
     "tests/compat/test_diffusers.py::test_diffusers_folders_of_another_dtype[torch.float16-one file]"),
    ("an output that is asked for by name", "return_dict=False)[0]", "return_dict=True).sample",
     OBSTACLES + "a_forward_pass_of_the_networks_own"),
]  # fmt: skip

FAST = [
    ("saved under this module's name", "    Fast.__module__ = base.__module__\n", "",
     ACCELERATED + "saved_with_an_optimised_network[DDPM]"),
    ("a timestep that is not cut off", "torch.full((1,), int(timestep),", "torch.full((1,), float(timestep),",
     "tests/fast/test_diffusers.py::test_forms_of_a_timestep[5.5]"),
    ("whole numbers come out", "if not sample.is_floating_point():", "if False:",
     "tests/fast/test_diffusers.py::test_errors"),
]  # fmt: skip

FAULTS = {
    "cmfast/fast/diffusers.py": FAST,
    DIFFUSERS + "network.py": DIFFUSERS_NETWORK,
    DIFFUSERS + "config.py": DIFFUSERS_CONFIG,
    DIFFUSERS + "convert.py": DIFFUSERS_CONVERT,
    DIFFUSERS + "scheduler.py": DIFFUSERS_SCHEDULER,
    DIFFUSERS + "pipeline.py": DIFFUSERS_PIPELINE,
}
