"""What stands in for openai's `cm`: its training."""

TRAINED = "tests/compat/test_openai_train.py::test_"
ENDS = "tests/compat/test_openai_train_ends.py::test_"
DATA = "tests/compat/test_openai_data.py::test_"
SCRIPTS = "tests/compat/test_openai_scripts.py::test_"
OPENAI = "cmfast/compat/openai/"

TRAIN_LOOP = [
    ("losses noted of one shape alone", "[..., None].flatten(1).mean(1)", "",
     "tests/compat/test_openai_train.py::test_losses_of_any_shape_are_noted"),
    ("steps before resuming count twice", "self._log_step(self.step)", "self._log_step(self.step + self.resume_step)",
     ENDS + "a_resumed_run_ends_where_an_uninterrupted_one_does[edm-3-False]"),
    ("gradients of each rank alone", "self.use_ddp = dist.get_world_size() > 1", "self.use_ddp = False",
     SCRIPTS + "training_on_two_ranks_and_on_from_there_on_one"),
    ("microbatches are averaged", 'loss = (losses["loss"] * weights).mean()',
     'loss = (losses["loss"] * weights).mean() * (len(micro) / len(batch))',
     TRAINED + "ends_where_the_original_does[edm]"),
    ("a learning rate below 0", "max(1 - self.step / self.lr_anneal_steps, 0)",
     "(1 - self.step / self.lr_anneal_steps)", ENDS + "consistency_ends_at_total_training_steps"),
    ("the last checkpoint is written twice", "                saved = self.step\n", "                pass\n",
     ENDS + "the_last_checkpoint_is_written_once[edm_loop]"),
    ("averages from float16", "self._load_master_parameters()\n        self.opt", "self.opt",
     ENDS + "a_resumed_run_ends_where_an_uninterrupted_one_does[progdist-3-True]"),
    ("ranges of timesteps are halves", "int(4 * t /", "int(2 * t /",
     TRAINED + "ends_where_the_original_does[consistency_training]"),
    ("timesteps taken for noise levels", "and not t.is_floating_point():", "and False:",
     TRAINED + "errors_name_what_is_wrong[<lambda>-UniformSampler draws.*--schedule_sampler lognormal]"),
    ("no diffusion takes timesteps", "is _TRAINING_LOSSES", "is not None",
     TRAINED + "what_users_change_is_trained_as_there[losses of timesteps]"),
    ("each rank looks for the optimizer's file alone", "        if len(found) > 1:\n", "        if False:\n",
     SCRIPTS + "ranks_whose_machine_has_no_checkpoint_go_on_as_the_first_does"),
    ("an optimizer of users is passed over", "_checkpoints.hooks().RAdam(", "torch.optim.RAdam(",
     TRAINED + "names_of_train_util_that_users_replace[RAdam]"),
]  # fmt: skip

TRAIN_UTIL = [
    ("a mode of a subclass is refused", "is function for name, function in _OWN.items()", "for name in _OWN",
     TRAINED + "what_users_change_is_trained_as_there[own mode]"),
    ("any teacher has the model's shapes", 'if training_mode == "progdist":  # alone', "if True:  # alone",
     TRAINED + "what_users_change_is_trained_as_there[a wider teacher]"),
    ("a frozen target teaches", "teacher_model=self.teacher_model,", "teacher_model=self.target_model,",
     TRAINED + "progressive_distillation_makes_each_student_the_next_teacher[0]"),
    ("the teacher stays", "update_ema(self.teacher_model.parameters(), self.model.parameters(), rate=0.0)", "pass",
     TRAINED + "progressive_distillation_makes_each_student_the_next_teacher[0]"),
    ("a former student with the first teacher's scalings", "self.teacher_diffusion if first_stage else self.diffusion",
     "self.teacher_diffusion", TRAINED + "progressive_distillation_makes_each_student_the_next_teacher[0]"),
    ("stages of two and of one scale are as short", "(2 if scales <= 2 else 1)", "1",
     TRAINED + "progressive_distillation_makes_each_student_the_next_teacher[2]"),
    ("the optimizer remembers the stage before", "        self.opt = self._make_optimizer()\n", "",
     TRAINED + "a_new_stage_starts_anew"),
    ("the position in a stage is lost", "self.step = self.global_step - first", "self.step = self.global_step",
     ENDS + "a_resumed_run_ends_where_an_uninterrupted_one_does[progdist-3-False]"),
    ("it never ends", "self.global_step < self.total_training_steps:", "self.global_step < 9:",
     ENDS + "consistency_ends_at_total_training_steps"),
    ("the target is averaged once more than it is used", "self.ema_scale_fn(self.global_step)\n        update_ema(",
     "self.ema_scale_fn(self.global_step + 3)\n        update_ema(",
     TRAINED + "ends_where_the_original_does[consistency_training]"),
    ("the target's float16 parameters stay", "        if self.use_fp16:\n            master_params_to_model_params(",
     "        if False:\n            master_params_to_model_params(",
     TRAINED + "ends_where_the_original_does[consistency_training]"),
]  # fmt: skip

CHECKPOINTS = [
    ("written in place", 'written_whole(path) as unfinished, open(unfinished, "wb")', 'open(path, "wb")',
     ENDS + "a_crash_while_saving_loses_nothing"),
    ("hooks of users are passed over", "hooks().get_blob_logdir()", "get_blob_logdir()",
     TRAINED + "hooks_that_users_replace"),
    ("a folder of users must be there", "    path.parent.mkdir(parents=True, exist_ok=True)\n", "",
     ENDS + "a_folder_of_users_is_made"),
]  # fmt: skip

FP16 = [
    ("the scale stays in the gradients", "2**-self.lg_loss_scale)", "1.0)",
     TRAINED + "ends_where_the_original_does[consistency_training]"),
    ("overflow is a step", "if check_overflow(grad_norm):", "if False:",
     TRAINED + "loss_that_stays_nan_ends_the_run"),
    ("the scale never grows", "self.lg_loss_scale += self.fp16_scale_growth", "pass",
     TRAINED + "ends_where_the_original_does[consistency_training]"),
    ("scalars with the matrices", "if parameter.ndim <= 1]", "if parameter.ndim < 1]",
     TRAINED + "master_parameters_and_state_dicts"),
]  # fmt: skip

DATASETS = [
    ("every rank reads all images", "image_paths[shard::num_shards]", "image_paths[:]",
     DATA + "shuffled_unconditional_and_of_this_rank"),
    ("waits for a batch that never fills", "if not 0 < batch_size <= len(dataset):", "if False:",
     DATA + "errors_before_the_first_batch[options3-batch_size is 6, and there are 5 images in]"),
    ("bicubic alone", "while min(image.size) >= 2 * smaller_side:", "while False:", DATA + "crops_and_flips"),
]  # fmt: skip

SAMPLERS = [
    ("each rank follows its own losses", "dist.get_world_size() > 1:", "dist.get_world_size() > 2:",
     SCRIPTS + "training_on_two_ranks_and_on_from_there_on_one"),
    ("losses are not weighted", "1 / (len(p) * p[timesteps])", "np.ones(batch_size)",
     DATA + "importance_sampling_keeps_the_mean"),
    ("the newest loss is dropped", "[*self._loss_history[t, 1:], loss]", "[loss, *self._loss_history[t, :-1]]",
     DATA + "losses_shape_the_distribution"),
    ("each rank all intervals", "(self.size * bs)", "bs", DATA + "even_lognormal_levels_of_all_ranks"),
    ("a level of infinity", "1 - 2**-24)", "1)", DATA + "even_lognormal_levels_are_finite[0.9999999403953552]"),
    ("a level of 0", "clamp(2**-25, ", "clamp(0, ", DATA + "even_lognormal_levels_are_finite[0.0]"),
]  # fmt: skip

SCRIPT_UTIL = [
    ("--loss_norm goes nowhere", 'settings = {"loss_norm": weight_schedule.loss_norm, **settings}', "pass",
     "tests/compat/test_openai_util.py::test_a_parsed_loss_norm_reaches_the_loss_in_the_arguments_asked_for"),
]  # fmt: skip

EDITING = [
    ("colorization draws in another order", "if self.drawn else x", "if False else x",
     "tests/compat/test_openai.py::test_editing_draws_noise_in_the_originals_order[iterative_colorization]"),
    ("an image for each of x", "images.shape[0] == 1", "False",
     "tests/compat/test_openai.py::test_one_image_is_edited_many_times[iterative_colorization-1]"),
]  # fmt: skip

DENOISER = [
    ("a Denoiser is scaled twice", 'isinstance(stated(model, "preconditioner"), Preconditioner)', "False",
     "tests/compat/test_openai.py::test_a_denoiser_is_no_network[sample]"),
    ("whole levels", "sigmas = sigmas if sigmas.is_floating_point() else sigmas.float()", "pass",
     "tests/compat/test_openai.py::test_denoise_at_whole_levels"),
    ("numbers come back as tensors", "part.numpy() if array.ndim else part.item()", "part",
     "tests/compat/test_openai.py::test_levels_of_any_kind[2.0]"),
    ("numbers on torch's default device", ', device="cpu"))', "))",
     "tests/compat/test_openai.py::test_numbers_and_arrays_beside_another_default_device"),
]  # fmt: skip

BLOCKS = [
    ("the original's order of arguments",
     "        use_conv: bool = False,\n        use_scale_shift_norm: bool = False,\n",
     "        use_scale_shift_norm: bool = False,\n        use_conv: bool = False,\n",
     "tests/compat/test_openai_util.py::test_blocks_take_the_originals_arguments"),
    ("a norm without weights", "(None if p is None else p.to(dtype) for", "(p.to(dtype) for",
     "tests/compat/test_openai_util.py::test_the_layers_of_a_network_are_these"),
]  # fmt: skip

UNET = [
    ("a first convolution of users is refused", 'getattr(first, "in_channels", self.in_channels)', "self.in_channels",
     "tests/test_unet.py::test_layers_that_users_replace_say_what_an_input_must_be[plain]"),
    ("classes that users add are refused", 'getattr(self.label_emb, "num_embeddings", self.num_classes)',
     "self.num_classes", "tests/test_unet.py::test_layers_that_users_replace_say_what_an_input_must_be[plain]"),
]  # fmt: skip

DIST_UTIL = [
    ("tasks of srun work alone", 'os.environ.get("SLURM_STEP_NUM_TASKS", 1)', "1",
     "tests/compat/test_openai_util.py::test_setup_dist_refuses_srun"),
    ("a batch script is taken for several tasks", '"SLURM_STEP_NUM_TASKS"', '"SLURM_NTASKS"',
     "tests/compat/test_openai_util.py::test_setup_dist_refuses_srun"),
    ("a store as torchrun left it", "        connect(backend)\n", "        dist.init_process_group(backend)\n",
     "tests/training/test_parallel.py::test_processes_that_start_again_do_not_call_those_that_are_gone[0-original]"),
    ("a group that nobody ends", "        atexit.register(end_group)  # nobody else", "        pass  # nobody else",
     "tests/training/test_parallel.py::test_processes_that_start_again_do_not_call_those_that_are_gone[0-original]"),
]  # fmt: skip

SPAWNED = SCRIPTS + "spawned_processes_find_cm_and_settings"

SHIM = [
    ("a cm beside the script goes first", "0 if beside else 1", "1", SPAWNED + "[beside a cm]"),
    ("settings stay in the first process", "json.dumps(list(settings))", '"[]"', SPAWNED + "[installed]"),
]  # fmt: skip

MAIN = [
    ("spawned processes find no cm", "    _shim.serve_spawned(options.settings)\n", "", SPAWNED + "[installed]"),
    ("a checkout is found by the first process alone", "sys.path.append(start)", "pass", SPAWNED + "[checkout]"),
]  # fmt: skip

SPAWNED_CM = [
    ("takes the name of another cm", 'if __name__ == "cm":', "if True:",
     SCRIPTS + "another_cm_is_found_where_no_script_runs"),
]  # fmt: skip

LOOPS = [
    ("the grid ends at sigma_min", "low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)",
     "return schedules.karras_sigmas(n, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, device=device)",
     "tests/compat/test_openai_calls.py::test_churn_at_the_ends_of_the_grid[bounds0-17]"),
    ("the slope of an x that a callback changed", 'used.add_(info["x"] - before)', "pass",
     "tests/compat/test_openai_calls.py::test_a_callback_changes_x_and_not_the_slope[sample_heun]"),
    ("a callback changes D behind the slope", "denoised.clone() if slope_first else denoised", "denoised",
     "tests/compat/test_openai_calls.py::test_a_callback_changes_x_and_not_the_slope[sample_euler]"),
    ("a step without the D that a callback changed", "callback, slope_first=False)", "callback, slope_first=True)",
     "tests/compat/test_openai_calls.py::test_a_callback_changes_what_the_ancestral_sampler_goes_on_from[False]"),
]  # fmt: skip

TRAINING_LOSSES = [
    ("progressive: states of 16 bits", "x_start = x_start.to(_check.sigma_dtype(x_start))", "pass",
     "tests/test_losses.py::test_progressive_distillation_of_16_bit_images[given-fp16]"),
]  # fmt: skip

SCHEDULES = [
    ("the root of what falls below 0", "max(growth + start_scales**2, 0)", "growth + start_scales**2",
     "tests/test_schedules.py::test_scales_that_fall_end_at_the_least"),
]  # fmt: skip

UNET_NAMES = [
    ("a name of cm.unet is not there", "    checkpoint,\n", "",
     "tests/compat/test_openai_util.py::test_what_scripts_import_from_cm_unet"),
]  # fmt: skip

FAULTS = {
    "cmfast/losses.py": TRAINING_LOSSES,
    "cmfast/schedules.py": SCHEDULES,
    "cmfast/unet.py": UNET,
    "cmfast/unet_blocks.py": BLOCKS,
    OPENAI + "__main__.py": MAIN,
    OPENAI + "_shim.py": SHIM,
    OPENAI + "_workers/cm/__init__.py": SPAWNED_CM,
    OPENAI + "_editing.py": EDITING,
    OPENAI + "_loops.py": LOOPS,
    OPENAI + "karras_diffusion.py": DENOISER,
    OPENAI + "_train_loop.py": TRAIN_LOOP,
    OPENAI + "train_util.py": TRAIN_UTIL,
    OPENAI + "_checkpoints.py": CHECKPOINTS,
    OPENAI + "fp16_util.py": FP16,
    OPENAI + "image_datasets.py": DATASETS,
    OPENAI + "resample.py": SAMPLERS,
    OPENAI + "script_util.py": SCRIPT_UTIL,
    OPENAI + "dist_util.py": DIST_UTIL,
    OPENAI + "unet.py": UNET_NAMES,
}
