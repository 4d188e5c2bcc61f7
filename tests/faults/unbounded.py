"""Data that is no picture, and pictures that are not pixels."""

TEST = "tests/test_unbounded.py::test_"

FAULTS = {
    "cmfast/samplers.py": [
        ("what comes out is clamped", "or not bounded else x.clamp", "else x.clamp",
         TEST + "nothing_is_clamped[heun-(2,)]"),
        ("D is clamped", "clip_denoised, bounded=bounded)", "clip_denoised)", TEST + "nothing_is_clamped[heun-(2,)]"),
        ("the model has the last word", "clip_denoised, bounded=bounded)", "clip_denoised and bounded)",
         TEST + "the_model_says_it"),
        ("pixels of anything", "    if not bounded:\n        raise", "    if False:\n        raise", TEST + "refusals"),
    ],
    "cmfast/denoiser.py": [
        ("D of latents is clamped", "clip=clip and bounded)", "clip=clip)", TEST + "a_sampler_alone"),
        ("a wrapper knows no range", 'stated(model, "bounded") is not False', 'getattr(model, "bounded", True)',
         TEST + "the_model_says_it"),
    ],
    "cmfast/editing.py": [
        ("edits of latents are clamped", "    clip = is_bounded(model)\n", "    clip = True\n",
         TEST + "edits_are_not_clamped"),
    ],
    "cmfast/checkpoint.py": [
        ("a file forgets the range", '{} if denoiser.bounded else {"bounded": False}', "{}",
         TEST + "the_model_says_it"),
        ("a range that is not read", 'settings.get("bounded", True)', "True", TEST + "the_model_says_it"),
    ],
    "cmfast/engine.py": [
        ("a graph of other pixels", "self.bounded, self.pixels, *options", "self.bounded, *options",
         "tests/test_engine_stress.py::test_settings_that_change[pixels-nearest]"),
        ("always pixels", "own or counter, self.pixels)", 'own or counter, "trunc")',
         TEST + "pixels_and_pictures_in_floats"),
        ("an empty batch of another kind", "if self.pixels is None:\n            return torch.empty",
         "if False:\n            return torch.empty", TEST + "pixels_and_pictures_in_floats"),
    ],
    "cmfast/cli.py": [
        ("a picture of latents", 'if sampler.pixels is None and path', "if False and path",
         TEST + "the_command_writes_numbers"),
    ],
    "cmfast/training/loop.py": [
        ("a grid of latents", "(samples, losses) if self.data.bounded else (losses,)", "(samples, losses)",
         TEST + "latents_are_trained_on[edm]"),
        ("latents for a model of images", "if model.bounded != data.bounded:", "if False:",
         TEST + "data_and_model_agree"),
    ],
    "cmfast/recipes.py": [
        ("latents of a teacher are images", "start is None or start.bounded", "True",
         TEST + "the_command_trains_on_numbers"),
        ("a model of latents makes pictures", "model.bounded = images.bounded", "pass",
         TEST + "the_command_trains_on_numbers"),
    ],
    "cmfast/data/__init__.py": [
        ("latents are resized", "if not data.bounded and (image_size", "if False and (image_size",
         TEST + "files_without_such_numbers"),
    ],
    "cmfast/data/arrays.py": [
        ("channels of latents last", "else _numbers(images, images_name)",
         "else _numbers(images, images_name).movedim(-1, 1)", TEST + "numbers_of_a_file[(5, 3, 17)]"),
        ("latents that are NaN", "if not (math.isfinite(low) and math.isfinite(high)):", "if False:",
         TEST + "refusals"),
    ],
}  # fmt: skip
