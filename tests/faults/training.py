"""The training step, its loop, checkpoints and processes; recipes."""

_STEP = "tests/training/test_step.py::test_"
_LOOP = "tests/training/test_loop.py::test_"
_PAIR = "tests/training/test_parallel.py::test_"
_FROZEN = "tests/training/test_frozen.py::test_"
_RECIPES = "tests/training/test_recipes.py::test_"
_DIGITS = "tests/training/test_digits.py::test_"

STEP = [
    ("the loss read at every step", "        self._note(total, number)\n",
     "        self._note(total, number)\n        total.item()\n", _STEP + "nothing_is_read_on_the_host[edm-float32]"),
    ("mean of microbatches", ".sum() / size", ".mean()", _STEP + "microbatches_change_nothing[edm]"),
    ("positions of the first microbatch in all", "index[part])", "index[:micro][: len(images[part])])",
     _STEP + "microbatches_change_nothing[edm]"),
    ("goes on after a bad step", "self._alive, torch.nan)", "1.0, torch.nan)",
     _STEP + "after_a_bad_step_nothing_changes[float32]"),
    ("the last bad step", "bad & (self._bad == NONE), number", "bad, number",
     _LOOP + "a_nan_loss_stops_with_a_checkpoint_of_the_step_before"),
    ("a bad loss in the mean", "torch.where(bad, 0.0, total)", "total", _STEP + "a_bad_step_can_be_left_out"),
    ("the mean over bad steps as well", "self._losses += ~bad", "self._losses += 1",
     _STEP + "the_loss_is_that_of_the_steps_that_are_taken"),
    ("steps without finite gradients taken", "options.max_norm or math.inf", "options.max_norm",
     _STEP + "a_bad_step_can_be_left_out"),
    ("float16 without scaling", 'if options.dtype == "float16" else None', "if False else None",
     _STEP + "overflow_in_float16_is_counted_and_goes_on"),
    ("the teacher stays", "                ours.copy_(students)", "                pass",
     _STEP + "the_student_becomes_the_teacher"),
    ("the optimizer stays",
     "        self.optimizer = self._optimizer()\n        self.optimizer.skipped", "        self.optimizer.skipped",
     _STEP + "the_student_becomes_the_teacher"),
    ("only parameters of the new teacher", "m.parameters(), m.buffers())", "m.parameters())",
     _STEP + "buffers_come_along_to_the_teacher"),
    ("what is frozen is trained", "self.model = model.train()", "self.model = model.requires_grad_(True).train()",
     _STEP + "what_is_frozen_stays"),
    ("a bad loss with good gradients is learnt from", "torch.where(loss.detach().isfinite(), self._alive, torch.nan)",
     "self._alive", _STEP + "a_bad_loss_is_enough[skip]"),
    ("data of any deviation", 'if getattr(objective, "weighting", None) in OF_DATA:', "if False:",
     _STEP + "models_that_do_not_go_together[other data]"),
    ("weights outside the network", "    if outside:", "    if False:",
     _STEP + "models_that_do_not_go_together[a weight outside]"),
    ("the target stays", "targets={0: self.target_model}", "targets={}",
     _STEP + "the_target_is_an_average_of_the_student"),
    ("any scalings", "    if name != objective.preconditioning:", "    if False:",
     _STEP + "models_that_do_not_go_together[other scalings]"),
    ("an overflow for ever", "(scale < LEAST_SCALE)", "False",
     _STEP + "gradients_that_no_scale_makes_finite_are_no_overflow"),
    ("any noise levels", "    if different:", "    if False:", _STEP + "models_that_do_not_go_together[another range]"),
    ("weights of any dtype", "        if dtypes:", "        if False:",
     _STEP + "weights_in_half_precision_are_not_trained[dtype0]"),
    ("blocks do not recompute", "        block.use_checkpoint = True",
     "        block.use_checkpoint = block.use_checkpoint",
     _STEP + "activations_made_again_change_nothing[cd]"),
    ("every process on its own", "            self.student = parallel.averaging(self.student)", "            pass",
     "tests/training/test_parallel.py::test_two_processes_learn_what_one_does[cd-ddp]"),
]  # fmt: skip

LOOP = [
    ("data from the start again", "start_step=self.done,", "start_step=0,",
     _LOOP + "resumed_is_uninterrupted[edm-float32]"),
    ("the log keeps steps that are done again", 'if line["step"] <= self.done]', "]",
     _LOOP + "resumed_is_uninterrupted[edm-float32]"),
    ("any configuration", "        if different:", "        if False:", _LOOP + "another_configuration_is_refused"),
    ("a NaN goes by unnoticed", 'self.options.on_nan == "stop":\n            self._stop',
     'False:\n            self._stop',
     _LOOP + "a_nan_loss_stops_with_a_checkpoint_of_the_step_before"),
    ("the state now, not before", "        self.done = step\n", "",
     _LOOP + "a_nan_loss_stops_with_a_checkpoint_of_the_step_before"),
    ("a new stage before the numbers of the old", "if self.step.renews(self.done):", "if False:",
     _LOOP + "a_nan_just_before_a_new_stage_stops_in_the_old_one[none sent]"),
    ("the scale after a stop", "        self.step.forget(self.done - step)\n", "",
     _LOOP + "a_nan_loss_leaves_the_scale_of_float16"),
    ("more steps of a falling learning rate", 'if self.options.decay == "constant":', "if True:", _LOOP + "more_steps"),
    ("a checkpoint before the numbers of its steps", "self._settle(bar)\n                    self.save()",
     "self._report(bar)\n                    self.save()",
     _LOOP + "a_nan_between_two_readings_shows_before_a_checkpoint[a checkpoint]"),
    ("pictures as of any objective", "{**self.step.objective.sampling(self.step.stage), ", "{",
     _LOOP + "pictures_are_drawn_as_the_objective_says"),
    ("a NaN is saved unseen", "        if self.step.unread:", "        if False:",
     "tests/training/test_stop.py::test_a_nan_is_not_saved_unseen"),
    ("what another has written is written over", "        if newest and newest[0][0] > self.done:", "        if False:",
     "tests/training/test_lock.py::test_a_trainer_holds_it_while_it_runs"),
    ("each process looks for the checkpoint itself", "if self.group.any(first and place.is_dir())():",
     "if first and place.is_dir():", _PAIR + "both_stop_at_a_step_just_saved"),
    ("the others put weights together alone", "                for _ in parts:  #", "                for _ in ():  #",
     _PAIR + "both_see_a_full_disk[a_full_disk]"),
    ("each process goes on from where it is", "if not self.group.same(start):", "if False:",
     _PAIR + "both_go_on_from_the_same_step"),
    ("an unlabelled data set for classes", "if model.num_classes is not None and data.num_classes is None:",
     "if False:",
     _LOOP + "data_that_does_not_fit[no labels]"),
]  # fmt: skip

CHECKPOINTS = [
    ("written in place", "temporary = home / f\"{_UNFINISHED}{step:08d}\"", "temporary = place",
     "tests/training/test_kills.py::test_killed_while_saving[5]"),
    ("half a checkpoint left", "        shutil.rmtree(temporary, ignore_errors=True)\n        raise", "        raise",
     _LOOP + "a_full_disk_loses_nothing[state.pt]"),
    ("one more is kept", "saved(run)[:-keep]", "saved(run)[: -keep - 1]", _LOOP + "the_last_checkpoints_stay"),
    ("links lead anywhere", "        if not target.is_relative_to(home):", "        if False:",
     "tests/test_hostile_files.py::test_refused_and_not_run[run: state.pt is a link to elsewhere]"),
    ("what a killed process left stays", "        shutil.rmtree(left, ignore_errors=True)", "        pass",
     _LOOP + "left_by_a_killed_process"),
]  # fmt: skip

CONFIG = [
    ("no way on from a NaN", '    "learning_rate", "max_norm", "on_nan",\n', "",
     _LOOP + "a_nan_loss_is_gone_on_from_as_the_message_says"),
    ("options of any kind", "        if not _is(given[name], hint):", "        if False:",
     _RECIPES + "what_is_refused[arguments14-options: steps must be a whole number, got 1.5]"),
    ("a run without a result", "        if not self.averages:", "        if False:",
     _RECIPES + "what_is_refused[arguments19-averages must have one rate or more]"),
    ("numbers without a dot are texts", "                given[name] = float(value)", "                pass",
     _RECIPES + "numbers_as_yaml_has_them"),
]  # fmt: skip

STATE = [
    ("the optimizer starts anew", '        step.optimizer.load_state_dict(state["optimizer"])\n', "",
     _LOOP + "resumed_is_uninterrupted[edm-float32]"),
    ("one number for a tensor", "        if got.shape != tensor.shape or", "        if False or",
     "tests/test_hostile_files.py::test_refused_and_not_run[run: one number for a tensor]"),
    ("the scale starts anew", '            step.scaler.load_state_dict(state["scaler"])', "            pass",
     _LOOP + "resumed_is_uninterrupted[cd-float16]"),
    ("the teacher starts anew", "            _load(step.teacher_model, folder / TEACHER)", "            pass",
     _LOOP + "resumed_is_uninterrupted[pd-float32]"),
    ("torch's generator starts anew", '        self._restore(state["random"], step.device)\n', "",
     _LOOP + "a_foreign_networks_dropout_resumes"),
    ("tied weights are not saved", "if place in places else", "if False else",
     _LOOP + "foreign_networks_resume[tied]"),
    ("names as torch.compile has them", 'name.replace("_orig_mod.", "")', "name",
     _LOOP + "foreign_networks_resume[compiled]"),
    ("skipped steps are forgotten", 'state.get("skipped", 0)', "0", _LOOP + "skipped_steps_are_counted_on"),
    ("a stage that was entered is entered again", 'state["step"] - 1)', "0)",
     _LOOP + "resumed_is_uninterrupted[pd-float32]"),
]  # fmt: skip

FROZEN = [
    ("weights made once", "if refresh is not None and refresh():", "if False:",
     _FROZEN + "a_run_with_graphs_is_one_without[True]"),
    ("one output for two calls", "program.run(values).clone()", "program.run(values)",
     _FROZEN + "a_run_with_graphs_is_one_without[False]"),
    ("the masks of the first call", 'values |= {"seed": draw.seed, "index": draw.index}', "pass",
     _FROZEN + "masks_follow_the_draw"),
    ("torch's generator in a graph", "not dropout.counts(self.network)", "False",
     _FROZEN + "a_foreign_networks_dropout_is_not_captured"),
]  # fmt: skip

RECIPES = [
    ("the curriculum of the paper's length", 'fields.setdefault("total_steps", steps)', "pass",
     _RECIPES + "settings_of_the_command_line"),
    ("the stages of the paper's length", '"steps_per_stage" not in fields', "False",
     _RECIPES + "stages_are_of_a_run_of_as_many_steps"),
    ("any deviation of the data", '"sigma_data": start.preconditioner.sigma_data}', '}',
     _RECIPES + "the_deviation_of_the_data_is_one"),
    ("the teacher's scalings", "aim.preconditioning, sigma_data", "model.preconditioner.name, sigma_data",
     _RECIPES + "every_recipe[cd]"),
    ("weights in the dtype of the file", 'load_teacher(paths["teacher"], dtype=torch.float32)',
     'load_teacher(paths["teacher"])', _RECIPES + "files_in_half_precision_are_trained_in_float32[torso-float32]"),
    ("a teacher by the name of its file", 'checkpoint.load_teacher(', "checkpoint.load(",
     _RECIPES + "bare_weights_of_a_teacher_are_a_diffusion_model[cd]"),
    ("the range of the paper", 'settings["objective"] |= _levels(', '_levels(',
     _RECIPES + "noise_levels_are_those_of_the_teacher[cd]"),
    ("a model for other levels than it learns", "(getattr(aim, name, getattr(model, name)) for name in LEVELS)",
     "(getattr(model, name) for name in LEVELS)", _RECIPES + "new_weights_are_for_the_noise_levels_that_are_set"),
    ("no stage of one step", '"pd": {"steps": 450_000', '"pd": {"steps": 350_000',
     _RECIPES + "progressive_distillation_ends_in_one_step"),
    ("dropout ignored", 'settings["dropout"] is not None', "False", _RECIPES + "settings_of_the_command_line"),
]  # fmt: skip

PARALLEL = [
    ("weights without a gradient are waited for", "    if unused:", "    if False:",
     _PAIR + "a_weight_without_gradient_is_named"),
    ("each process starts from its own weights", "        tensor.copy_(whole)", "        pass",
     _PAIR + "both_start_alike"),
    ("a target's own tensors stay put together", ", reshard_after_forward=True", "",
     "tests/training/test_parallel.py::test_two_processes_learn_what_one_does[cd-fsdp]"),
]  # fmt: skip

WATCH = [
    ("fused optimizers go by unseen", 'if group.get("fused"):', "if False:",
     "tests/test_engine_changes.py::test_fused_optimizers_are_seen[Adam]"),
]  # fmt: skip

DIGITS = [
    ("the same class pushed away from", "steps = 1 + ops.uniform_int", "steps = ops.uniform_int",
     _DIGITS + "guidance_pushes_away_from_another_class"),
    ("a stop at the end of a stage is forgotten", "if stop.now():", "if False:",
     _DIGITS + "stages_stopped_between_two"),
    ("a student without its boundary condition", "as_consistency_model(teacher), objective", "teacher, objective",
     _DIGITS + "stages_stopped_between_two"),
]  # fmt: skip

FAULTS = {
    "cmfast/training/step.py": STEP,
    "cmfast/training/loop.py": LOOP,
    "cmfast/training/checkpoints.py": CHECKPOINTS,
    "cmfast/training/config.py": CONFIG,
    "cmfast/training/state.py": STATE,
    "cmfast/training/frozen.py": FROZEN,
    "cmfast/recipes.py": RECIPES,
    "cmfast/training/parallel.py": PARALLEL,
    "cmfast/watch.py": WATCH,
    "cmfast/digits.py": DIGITS,
}
