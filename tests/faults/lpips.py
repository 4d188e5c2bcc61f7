"""LPIPS: its kernels, its operations, and the module."""

from tests.faults.ids import T_SOUND

T_KERNELS, T_OPS = "tests/kernels/test_lpips.py::test_", "tests/ops/test_lpips.py::test_"
T_LAYER = T_KERNELS + "layer_agrees_with_float64[{}-(2, 37, 4, 4)-channels_last]"
T_INPUT = T_KERNELS + "input_agrees_with_float64[{}-channels_last]"
T_STRIPS = "tests/ops/test_lpips.py::TestStrips::test_"
T_MODULE = "tests/test_perceptual.py::test_"

LAYER = [
    ("lengths' gradient forgotten", "(grad - x * slope[:, None])", "grad", T_LAYER.format("large tiles")),
    ("gradient of a length of zero: 0 / 0", "lies = length > 0.0", "lies = length >= 0.0",
     T_KERNELS + "layer_where_all_channels_are_zero[contiguous]"),
    ("both maps by the length of one",
     "(f - g) * least[:, None] + (f * (by_f - least)[:, None] - g * (by_g - least)[:, None])",
     "f * by_f[:, None] - g * by_f[:, None] + (f - g) * least[:, None]", T_LAYER.format("large tiles")),
    ("the larger factor taken out", "least = tl.minimum(by_f, by_g)", "least = tl.maximum(by_f, by_g)",
     T_KERNELS + "layer_where_all_channels_are_zero[contiguous]"),
    ("sum over the pixels, not their mean", "tl.div_rn(tl.sum(total), tl.cast(pixels, tl.float32))", "tl.sum(total)",
     T_LAYER.format("large tiles")),
    ("gradient without the 2 of the square", "tl.div_rn(2.0 * tl.load(grad_ptr", "tl.div_rn(tl.load(grad_ptr",
     T_LAYER.format("large tiles")),
    ("first sample's gradient for all", "tl.load(grad_ptr + row)", "tl.load(grad_ptr)", T_LAYER.format("large tiles")),
    ("a part begins where the first tile of the last did", "(part * STEPS + step) * ROWS", "(part + step) * ROWS",
     T_LAYER.format("small tiles"), 2, 1),
    ("pixels of the next sample counted", "(pixel < pixels - start)[:, None] & ", "(pixel < ROWS)[:, None] & ",
     T_KERNELS + "layer_agrees_with_float64[large tiles-(2, 64, 5, 3)-channels_last]"),
    ("channels beyond the last counted", "& (channel < C)[None, :]", "& (channel < CHANNELS)[None, :]",
     T_LAYER.format("large tiles")),
    ("gradient of the target has the wrong sign", "_through_length(-grad, g", "_through_length(grad, g",
     T_LAYER.format("large tiles")),
    ("g read in its own order", "dense(g, f)", "dense(g)",
     T_KERNELS + "layer_wherever_the_maps_lie[misaligned-channels_last]"),
    ("an expanded gradient taken for dense", "grad.contiguous(), maps.f", "grad, maps.f",
     T_KERNELS + "layout_of_incoming_gradients[layer]"),
    ("channels counted in 32 bits", "channel.to(tl.int64)[None, :] * pixels", "channel[None, :] * pixels",
     T_SOUND.format("lpips_layer, 64 of 224x224, contiguous")),
    ("one sample for all parts", "(program // parts).to(tl.int64)", "(program // parts * 0).to(tl.int64)",
     T_LAYER.format("large tiles"), 2, 1),
]  # fmt: skip

INPUT = [
    ("corners aligned", "tl.maximum((2 * position + 1) * in_size - size, 0)",
     "tl.maximum(2 * position * in_size, 0)", T_INPUT.format("(2, 3, 3, 4)-(6, 5)")),
    ("no clamp at the first pixel", "tl.maximum((2 * position + 1) * in_size - size, 0)",
     "(2 * position + 1) * in_size - size", T_INPUT.format("(1, 3, 2, 2)-7")),
    ("beyond the last pixel", "tl.where(first + 1 < in_size, first + 1, first)", "first + 1",
     T_INPUT.format("(1, 3, 2, 2)-7")),
    ("left and right swapped", "(a * (1.0 - across) + b * across)", "(a * across + b * (1.0 - across))",
     T_INPUT.format("(2, 3, 3, 4)-(6, 5)")),
    ("rows swapped", "* (1.0 - down) + (c", "* down + (c", T_INPUT.format("(2, 3, 3, 4)-(6, 5)")),
    ("a pixel that took of one is missed", "2 * out // each + 2", "2 * out // each",
     T_INPUT.format("(1, 3, 5, 4)-(2, 3)")),
    ("columns beyond the last counted", "tl.where(position < size, share, 0.0)", "share",
     T_INPUT.format("(1, 3, 2, 2)-7")),
    ("first taker one too late", "in_size, 0) // in_size // 2", "in_size, 0) // in_size // 2 + 1",
     T_INPUT.format("(2, 3, 3, 4)-(6, 5)")),
    ("gray takes one channel's gradient", "tl.static_range(C if IN_C < C else 1)", "tl.static_range(1)",
     T_KERNELS + "gray_input[large tiles-None-channels_last]"),
    ("gray reads other channels", "of = channel if IN_C == C else channel * 0", "of = channel",
     T_KERNELS + "gray_input[large tiles-(5, 6)-contiguous]"),
    ("range ignored", "load_state(mean_ptr, channel, mask) * span + low", "load_state(mean_ptr, channel, mask) + low",
     T_KERNELS + "contiguous_input[(1, 5, 2, 3)-contiguous]"),
    ("std ignored in the gradient", "total += taken * _gain(std_ptr, channel, mask, span)", "total += taken",
     T_INPUT.format("(2, 3, 3, 4)-None")),
    ("image in another order taken for its own", "image, grad = dense(image), dense(grad)", "grad = dense(grad)",
     T_KERNELS + "input_wherever_the_image_lies[transposed]"),
    ("one step of a row", '"STEPS": -(-elements // block)', '"STEPS": 1',
     T_KERNELS + "input_in_several_steps_of_a_row[small tiles]"),
]  # fmt: skip

OP = [
    ("size of one number is a height", "(size, size) if isinstance(size, int | Integral)",
     "(size, own[1]) if isinstance(size, int | Integral)",
     T_OPS + "input_is_interpolate_then_standardise"),
    ("kernels for nothing", "*inputs) and features.numel():", "*inputs):", T_KERNELS + "empty"),
]  # fmt: skip

STRIPS = [
    ("lengths' gradient forgotten", "value=-1, out=made", "value=0, out=made", T_STRIPS + "agrees_with_float64"),
    ("gradient of a length of zero: 0 / 0", ".masked_fill_(length == 0, 0)", "", T_STRIPS + "equal_maps_and_zeros"),
    ("gradient without the 2 of the square", "weight * (2 / pixels)", "weight / pixels",
     T_STRIPS + "agrees_with_float64"),
    ("upstream gradient ignored", "gradient * grad[:, None, None, None]", "gradient", T_STRIPS + "agrees_with_float64"),
    ("contiguous maps", " or not all(map(native.channels_last, inputs[:2])):", ":",
     T_STRIPS + "what_it_does_not_serve[contiguous]"),
    ("one strip alone", "range(0, pixels, count)", "range(0, count, count)", T_STRIPS + "agrees_with_float64"),
]  # fmt: skip

REFERENCE = [
    ("standardised before the range", "((x - low) / (high - low) - mean) / std",
     "((x - mean) / std - low) / (high - low)",
     T_OPS + "input_is_interpolate_then_standardise"),
    ("resized in half precision", "x = image.to(wide)", "x = image", T_OPS + "input_rounds_once[torch.bfloat16]"),
]  # fmt: skip

MODULE = [
    ("heads that are trained", "weights[name].detach()", "weights[name]", T_MODULE + "heads_that_are_parameters"),
    ("a graph for both images", "(x.requires_grad or target.requires_grad)",
     "target.requires_grad",
     T_MODULE + "target_costs_no_graph"),
    ("one pass of the trunk for each image always", "images = [torch.cat(images)]", "pass",
     T_MODULE + "both_images_in_one_pass_where_no_graph_is_recorded"),
    ("float32 on a GPU", "self.trunk.to(torch.bfloat16)", "pass", T_MODULE + "dtype_on_a_gpu[None]"),
    ("what was asked for ignored on a GPU", "self.heads.is_cuda and self.dtype is None and", "self.heads.is_cuda and",
     T_MODULE + "dtype_on_a_gpu[torch.float32]"),
    ("heads rounded too", "self.trunk.to(dtype)", "self.to(dtype)", T_MODULE + "dtype_is_that_of_the_trunk_alone"),
    ("images of the second half first", "maps[0].tensor_split(2)", "maps[0][::2], maps[0][1::2]",
     T_MODULE + "both_images_in_one_pass_where_no_graph_is_recorded"),
    ("filters of what was moved", "        self._on_cpu = perceptual_cpu.Trunk()  # w", "        # w",
     "tests/test_perceptual_cpu.py::test_filters_are_made_once"),
    ("weights contiguous", "trunk.to(memory_format=torch.channels_last)", "trunk",
     T_MODULE + "dtype_is_that_of_the_trunk_alone"),
]  # fmt: skip

T_CPU = "tests/test_perceptual_cpu.py::test_"

ON_CPU = [
    ("all images at once", "// (height * width))", ")", T_CPU + "a_few_images_at_a_time[True]"),
    ("hooks see parts", "return all(map(called_plainly, trunk.modules()))", "return True", T_CPU + "hooks_are_called"),
    ("fused optimizers go by", "        see_fused_optimizers()\n", "", T_CPU + "fused_optimizers_are_seen"),
    ("hooks where there may be none", "if allowed else nullcontext()", "if True else nullcontext()",
     T_CPU + "where_hooks_for_what_is_saved_are_forbidden"),
    ("no gradient of what is frozen mostly", "for x in (target, *weights))", "for x in (target,))",
     T_CPU + "whatever_needs_a_gradient_has_one[heads]"),
    ("a checkpoint's hooks for what is gone soon", ", _without_hooks():", ":",
     T_CPU + "within_a_checkpoint"),
    ("every sample's gradient alike", "gradient * grad[:, None, None, None]", "gradient * grad.mean()",
     T_CPU + "values_and_gradients[vgg-3-40-False]"),
    ("filters for each call", "\"filters\": self._filters, ", "", T_CPU + "filters_are_made_once"),
    ("memory for each call", "\"workspace\": self._workspace", "", T_CPU + "convolutions_share_memory"),
]  # fmt: skip

FAULTS = {
    "kernels/lpips.py": LAYER,
    "kernels/lpips_input.py": INPUT,
    "cmfast/ops/lpips.py": OP,
    "cmfast/ops/_strips.py": STRIPS,
    "cmfast/reference/lpips.py": REFERENCE,
    "cmfast/perceptual.py": MODULE,
    "cmfast/perceptual_cpu.py": ON_CPU,
}
