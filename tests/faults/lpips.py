"""LPIPS: its kernels, its operations, and the module."""

from tests.faults.ids import T_SOUND

T_KERNELS, T_OPS = "tests/kernels/test_lpips.py::test_", "tests/ops/test_lpips.py::test_"
T_LAYER = T_KERNELS + "layer_agrees_with_float64[{}-(2, 37, 4, 4)-channels_last]"
T_INPUT = T_KERNELS + "input_agrees_with_float64[{}-channels_last]"
T_NATIVE = "tests/native/test_lpips.py::test_"
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

LAYER_C = [
    ("lengths' gradient forgotten", "- at[c] * back)", ")", T_NATIVE + "layers"),
    ("gradient of a length of zero: 0 / 0", "length == 0 ? 0 : along", "along", T_NATIVE + "equal_maps_and_zeros"),
    ("gradient without the 2 of the square", "slope = 2.0 / pixels", "slope = 1.0 / pixels", T_NATIVE + "layers"),
    ("equal maps that differ", "return (f - g) * by.least + (f * by.more_f - g * by.more_g);",
     "return f * (by.least + by.more_f) - g * (by.least + by.more_g);", T_NATIVE + "equal_maps_and_zeros"),
    ("the larger factor taken out", "least = by_f < by_g ? by_f : by_g", "least = by_f > by_g ? by_f : by_g",
     T_NATIVE + "a_pixel_where_one_map_is_zero"),
    ("whole parts alone", "? (part + 1) * PIXELS : pixels", "? (part + 1) * PIXELS : part * PIXELS",
     T_NATIVE + "layers"),
    ("sums by threads", "sums[b * parts + part] = sum;", "sums[b * parts + part] = sum + omp_get_thread_num();",
     T_NATIVE + "same_bits_for_any_batch_and_threads[layer]"),
    ("pixels that lie at corners", "scale * (at + 0.5f) - 0.5f", "scale * at", T_NATIVE + "resizing_is_pytorchs"),
    ("pixels that float32 does not count", "if (scale == 1)", "if (0)", T_NATIVE + "more_pixels_than_float32_counts"),
    ("pixels before the first", "x = x > 0 ? x : 0;", "", T_NATIVE + "images"),
    ("a pixel after the last", "low + (low < count - 1)", "low + 1", T_NATIVE + "images"),
    ("neighbours that are no numbers", "part == 0 ? first :", "",
     T_NATIVE + "pixels_that_are_no_numbers_stay_where_they_are"),
    ("no range", "-(low / (high - low) + mean[c])", "-(low + mean[c])", T_NATIVE + "a_range_of_values"),
    ("gray is one channel", "(it.own == 1 ? 0 : c) * it.of_channel;\n            float",
     "c * it.of_channel;\n            float", T_NATIVE + "gray_counts_in_all_channels"),
    ("a row of before", "held[row & 1] != row", "held[row & 1] < 0", T_NATIVE + "images"),
    ("gradients of the rows beside alone", "begin = row == 0 ? 0 : (row - 0.5) / scale - 1.5",
     "begin = row == 0 ? 0 : (row + 0.5) / scale", T_NATIVE + "images"),
    ("no gradient at the end", "end = row == it.height - 1 || end > it.rows ? it.rows : end;",
     "end = end > it.rows ? it.rows : end; end -= row == it.height - 1;", T_NATIVE + "images"),
    ("no gradient of the pixel after", "if (at.part != 0)\n", "if (0)\n", T_NATIVE + "images"),
]  # fmt: skip

NATIVE = [
    ("contiguous maps", "    if not native.channels_last(features) or (recorded", "    if (recorded",
     T_NATIVE + "what_is_not_served[contiguous]"),
    ("upstream gradient ignored", "return gradient * grad.view(-1, *[1] * (gradient.ndim - 1))", "return gradient",
     T_NATIVE + "layers"),
    ("memory of the next to ask", "once = not torch._C._autograd._get_current_graph_task_keep_graph()", "once = True",
     T_NATIVE + "a_gradient_is_nobody_elses[layer]"),
    ("any upstream gradient is one", " and (grad.numpy() == 1).all():", ":", T_NATIVE + "layers"),
    ("a target in another layout", "beside(target_features, features)", "target_features",
     T_NATIVE + "what_is_not_served[channels_last]"),
    ("statistics with gaps", "mean, std = mean.contiguous(), std.contiguous()", "pass",
     T_NATIVE + "what_is_not_served[channels_last]"),
    ("halves that are floats", "if dtype not in (None, DTYPE) or not len(mean):", "if not len(mean):",
     T_NATIVE + "what_is_not_served[contiguous]"),
    ("a gradient in another layout", "grad if last else grad.contiguous()", "grad",
     T_NATIVE + "upstream_gradients_of_any_kind[expanded-input]"),
    ("a gradient of any kind", "for x in (grad, image, std))", "for x in (image, std))",
     T_NATIVE + "upstream_gradients_of_any_kind[negated-input]"),
    ("an image of any kind", "for x in (grad, image, std))", "for x in (grad, std))",
     T_NATIVE + "what_is_saved_comes_back_another[dtype of images-input]"),
    ("a checkpoint's hooks for what is gone soon", "with without_hooks():", "if True:",
     T_NATIVE + "gradients_before_who_looks_on[True-forward-layer]"),
    ("a mode sees no layers", "    if native.watched():\n        from", "    if False:\n        from",
     T_NATIVE + "gradients_before_who_looks_on[True-forward-layer]"),
]  # fmt: skip

REFERENCE = [
    ("standardised before the range", "((x - low) / (high - low) - mean) / std",
     "((x - mean) / std - low) / (high - low)",
     T_OPS + "input_is_interpolate_then_standardise"),
    ("resized in half precision", "x = image.to(wide)", "x = image", T_OPS + "input_rounds_once[torch.bfloat16]"),
]  # fmt: skip

MODULE = [
    ("heads that are trained", "weights[name].detach()", "weights[name]",
     "tests/test_perceptual_weights.py::test_heads_that_are_parameters"),
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
    ("no gradient of what is frozen mostly", "for x in (target, *weights))", "for x in (target,))",
     T_CPU + "whatever_needs_a_gradient_has_one[heads]"),
    ("a checkpoint's hooks for what is gone soon", ", without_hooks():", ":",
     T_CPU + "within_a_checkpoint"),
    ("every sample's gradient alike", "lpips.times(gradient, grad)", "gradient * grad.mean()",
     T_CPU + "values_and_gradients[vgg-3-40-False]"),
    ("filters for each call", "\"filters\": self._filters, ", "", T_CPU + "filters_are_made_once"),
    ("memory for each call", "\"workspace\": self._workspace", "", T_CPU + "convolutions_share_memory"),
]  # fmt: skip

FAULTS = {
    "kernels/lpips.py": LAYER,
    "kernels/lpips_input.py": INPUT,
    "cmfast/ops/lpips.py": OP,
    "cmfast/native/lpips.c": LAYER_C,
    "cmfast/native/lpips.py": NATIVE,
    "cmfast/reference/lpips.py": REFERENCE,
    "cmfast/perceptual.py": MODULE,
    "cmfast/perceptual_cpu.py": ON_CPU,
    "cmfast/ops/_autograd.py": [
        ("hooks where there may be none", "if allowed else nullcontext()", "if True else nullcontext()",
         T_CPU + "where_hooks_for_what_is_saved_are_forbidden"),
    ],
}
