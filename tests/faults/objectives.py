"""Objectives, curricula, what a training step draws, paired dropout."""

from tests.faults.ids import kernel

_T, _F = "tests/test_objectives.py::test_", "tests/test_objective_formulas.py::test_"
_P, _W = "tests/test_progressive_distillation.py::test_", "tests/test_wrapped_models.py::test_"
_D, _K = "tests/test_dropout.py::test_", "tests/kernels/test_draw.py::test_"
_LEVELS = _K + "levels_are_those_of_the_reference[{}]"
_MASKS = _K + "dropout_is_that_of_the_reference[torch.float32-(2, 6, 9, 5)-{}]"

CURRICULA = [
    ("N(k): one level too few", "min(start_scales * 2**stage, end_scales) + 1",
     "min(start_scales * 2**stage, end_scales)",
     _F + "ict_number_of_levels[400000-10-1280]"),
    ("K' without the last stage", "(math.log2(end_scales // start_scales) + 1)",
     "math.log2(end_scales // start_scales)",
     _F + "ict_number_of_levels[1000-10-160]"),
    ("ECT: a stage behind", "q ** -(stage + 1.0)", "q ** -(stage + 0.0)", _F + "ect_second_level[2.0-8.0-1.0-1]"),
    ("iCT: sqrt2 forgotten", "(math.sqrt(2) * std)", "std", _F + "ict_levels_are_drawn_as_often_as_they_should[11]"),
    ("iCT: thresholds of the next index", "(tail[1:-1] - tail[0])", "(tail[:-2] - tail[0])",
     _F + "ict_levels_are_drawn_as_often_as_they_should[11]"),
    ("grids of fake tensors are kept", " or torch._C._get_dispatch_mode(fake) is not None", "",
     _F + "grids_of_fake_tensors_are_not_kept"),
    ("halves without a middle", "_table(2 * num_scales + 1,", "_table(2 * num_scales - 1,",
     _F + "uniform_and_halved_levels"),
]  # fmt: skip

REFERENCE = [
    ("levels from noise's own counter", "return LEVEL_DRAW - (", "return (",
     _LEVELS.format("alike-1099511627779-3-False")),
    ("a number of few bits wraps", "draw.draw.to(torch.int64) if isinstance", "draw.draw if isinstance",
     "tests/kernels/test_draw.py::test_seeds_and_draws_of_any_shape_and_dtype[reference-torch.uint8-()]"),
    ("r not cut off at 0", "(1 - _part(sigma, below))).clamp(min=0)", "(1 - _part(sigma, below)))",
     _F + "ect_second_level[2.0-8.0-1.0-0]"),
    ("the gap not cut off at sigma", "_part(sigma, below).clamp(max=1)", "_part(sigma, below)",
     _F + "ect_loss[0.0-edm]"),
    ("the gap may be 0", ".clamp(min=torch.finfo(sigma.dtype).tiny)", ".clamp(min=0)",
     _F + "ect_levels_may_come_closer_than_numbers_do[torch.float32]"),
    ("thresholds that a word equals", "word, right=True)", "word - 1, right=True) * 0",
     _F + "levels_are_drawn_by_their_thresholds"),
    ("lognormal: a variance", "torch.exp(levels.mean + levels.std * z)", "torch.exp(levels.mean + levels.std**2 * z)",
     _F + "ect_second_level[2.0-8.0-1.0-0]"),
]  # fmt: skip

LOSSES = [
    ("levels on torch's default device", "    return sigma\n", "    return torch.as_tensor(sigma)\n",
     "tests/test_losses.py::test_another_default_device"),
    ("ECT: pairs as close as rounding", "if below.factor < closest:", "if False:",
     _F + "ect_pairs_closer_than_their_numbers_are_refused[2.0-16]"),
    ("indices outside of the grid", "if not 0 <= low <= top < high:", "if not 0 <= low <= top <= high:",
     "tests/test_losses.py::test_indices_of_the_grid"),
    ("iCT: no weight", "weighting=1 / gap)", "weighting=gap / gap)", _F + "ict_loss[None]"),
    ("ECT: x_start is no target of a function", "torch.where(at_zero, x_start,",
     "torch.where(at_zero & False, x_start,",
     _F + "ect_loss[0.0-consistency]"),
    ("ECT: exact for every Denoiser", 'and student.scaling["boundary"] == 0', "", _F + "ect_loss[0.0-consistency]"),
    ("own target outside the pairing", "    with torch.no_grad(), pairing:\n        target_output = student(",
     "    with torch.no_grad():\n        target_output = student(",
     _D + "every_loss_with_a_target_of_its_own_drops_the_same[Counted]"),
    ("the target outside the pairing", "    with torch.no_grad(), pairing:\n        target_output = target(",
     "    with torch.no_grad():\n        target_output = target(",
     _D + "student_and_target_drop_the_same[None-Counted-counters]"),
    ("a teacher outside the pairing", "        with pairing:\n            second = _solve(",
     "        if True:\n            second = _solve(",
     _D + "a_teacher_in_training_mode_drops_by_the_draw_too"),
    ("a teacher of progressive distillation outside the pairing", "    with pairing:\n        x_mid,",
     "    if True:\n        x_mid,",
     _D + "a_teacher_in_training_mode_drops_by_the_draw_too"),
    ("the teacher's steps from the wrong middle", "sigma, next_sigma, mid_sigma = drawn",
     "sigma, mid_sigma, next_sigma = drawn",
     _P + "progressive_distillation_distils"),
    ("denoising's noise of another draw", "_drawing(draw, x_start, noise), sigma, pair=False",
     "_drawing(None, x_start, noise), sigma, pair=False", _T + "a_batch_may_be_shared_between_ranks[edm]"),
]  # fmt: skip

OBJECTIVES = [
    ("values are read in a step", "with _check.unread():", "with __import__('contextlib').nullcontext():",
     _T + "nothing_is_read_on_the_host[toy-cd]"),
    ("the target for the teacher", 'model, teacher_model, x_start, stage.levels',
     'model, others["target_model"], x_start, stage.levels',
     _P + "progressive_distillation_distils"),
    ("halvings of powers of two alone", "(start // 3).bit_length()", "start.bit_length() - 2",
     _P + "halving_stages[3-10]"),
    ("the last stages as short as the others", "+ 2 * steps)", "+ steps)", _P + "halving_stages[16-100]"),
    ("ECT's stage of a step", "min(step // self.steps_per_stage,", "min(step // self.steps_per_stage + 1,",
     _F + "ect_loss[0.0-edm]"),
    ("ECT's stages have no end", "min(step // self.steps_per_stage, self.stages - 1)", "step // self.steps_per_stage",
     _F + "ect_stages_end"),
]  # fmt: skip

DROPOUT = [
    ("activations made again with other masks", "        note(self, draw is not None)\n", "",
     _D + "torchs_checkpoint_around_a_network[hooks-ordinary]"),
    ("a pass without a draw is none", "        _counted.discard(id(layer))\n", "        pass\n",
     _D + "torchs_checkpoint_around_a_network[hooks-ordinary]"),
    ("another mask for the target", "            self._restore()\n        self._before",
     "            pass\n        self._before",
     "tests/test_losses.py::test_student_and_target_see_the_same_dropout"),
    ("every layer the same mask", "draw=DROPOUT_DRAW + self.layer", "draw=DROPOUT_DRAW", _D + "masks_are_counted"),
    ("draw numbers forgotten", "    elif number:\n", "    elif False:\n", _D + "masks_follow_from_the_draw"),
    ("recomputed outside of the draw", "    if draw is None or torch.compiler.is_compiling():", "    if True:",
     _D + "a_checkpointed_network_drops_the_same_again[ordinary]"),
    ("in evaluation mode too", "not self.training or not", "not", _D + "outside_it_is_torchs"),
    ("paired for good", "        _now.draw = before\n\n\ndef _first", "        pass\n\n\ndef _first",
     _D + "outside_it_is_torchs"),
    ("generators kept where all is counted", "draw is not None and all(map(counts, models))", "False",
     _D + "no_generator_is_touched_where_all_is_counted"),
]  # fmt: skip

FAST = [
    ("an optimised network draws for itself", "        if draw is not None:\n", "        if draw is None:\n",
     _D + "an_optimised_network_drops_what_the_ordinary_does"),
]  # fmt: skip

DENOISER = [
    ("classes of a wrapped network not seen", 'said = stated(network, "num_classes")',
     'said = getattr(network, "num_classes", None)', _W + "distributed_models_are_accepted[ddp inside-edm]"),
    ("a Denoiser compiled in place is passed by", ' or own.get("_compiled_call_impl") is not None', "",
     _W + "compiled_models_are_accepted[compiled in place-edm]"),
]  # fmt: skip

KERNEL = [
    ("levels of another counter", "number = 0xFFFFFFFD", "number = 0xFFFFFFFC",
     _LEVELS.format("alike-1099511627779-3-False")),
    ("an index one too high", "return (value * intervals) >> 32", "return ((value * intervals) >> 32) * 0",
     _LEVELS.format("alike-1099511627779-3-False")),
    ("search: a threshold that a word equals is passed", "(threshold <= value)", "(threshold > value)",
     _LEVELS.format("many thresholds-1099511627779-3-False")),
    ("search: the last step left out", "tl.static_range(SEARCH):", "tl.static_range(SEARCH - 1):",
     _LEVELS.format("many thresholds-1099511627779-3-False")),
    ("search: beyond the thresholds", "exists = last + 1 < intervals", "exists = last < intervals",
     _LEVELS.format("many thresholds-1099511627779-3-False")),
    ("the middle for the next", "tl.load(at + STRIDE).to", "tl.load(at + STRIDE // 2).to",
     _LEVELS.format("alike-1099511627779-3-False")),
    ("r not cut off at 0", "sigmoid(-b * sigma))), 0.0)", "sigmoid(-b * sigma))), -1.0)",
     _LEVELS.format("below-1099511627779-3-False")),
    ("e^x without the rest of ln 2", "- count * 1.42860682030941723e-06", "",
     _LEVELS.format("wide-1099511627779-3-False")),
    ("the second point at the first level", "value = start + next_level * eps", "value = start + level * eps",
     kernel("draw_pair drawn")),
    ("c_in of the first level for both", "input_scale(next_level, sigma_data, PLAIN) * value",
     "input_scale(level, sigma_data, PLAIN) * value", kernel("draw_pair drawn")),
    ("levels of another sample", "tl.store(sigma_ptr + row, level)", "tl.store(sigma_ptr, level)",
     _LEVELS.format("alike-1099511627779-3-False")),
]  # fmt: skip

DROPOUT_KERNEL = [
    ("parts of channels from the start", "first = (program % parts).to(tl.int64) * CHANNELS",
     "first = (program % parts).to(tl.int64) * 0", _MASKS.format("contiguous")),
    ("planes for pixels", "at = base + channel[None, :] * pixels + pixel[:, None]",
     "at = base + pixel[:, None] * channels + channel[None, :]", _MASKS.format("contiguous")),
    ("a wrong end of the channels", "(channel < channels)[None, :]", "(channel <= channels)[None, :]",
     _MASKS.format("contiguous")),
]  # fmt: skip

FAULTS = {
    "cmfast/curricula.py": CURRICULA,
    "cmfast/reference/draw.py": REFERENCE,
    "cmfast/losses.py": LOSSES,
    "cmfast/objectives.py": OBJECTIVES,
    "cmfast/dropout.py": DROPOUT,
    "cmfast/fast/forward.py": FAST,
    "cmfast/denoiser.py": DENOISER,
    "kernels/draw.py": KERNEL,
    "kernels/dropout.py": DROPOUT_KERNEL,
}
