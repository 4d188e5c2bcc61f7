"""Numbers as torch.compile passes them to kernels, and what it asks of differentiable functions."""

from tests.faults.ids import T_NUMBERS, one_level

_VIEWS = "tests/aot/test_inductor.py::test_results_of_a_function_are_no_views[{}-one level]"


def at(use: str) -> str:
    return T_NUMBERS.format(use)


FAULTS = {
    "cmfast/ops/_autograd.py": [
        ("c_noise is not expanded", "x.expand(batch) if i in c_noise and x.shape[0] != batch else x", "x",
         one_level("scale_input")),
        ("c_noise's gradient before it is expanded", "(value, grad) if value.shape == grad.shape else (value[:1], grad",
         "(value, grad) if True else (value[:1], grad", one_level("scale_input")),
    ],
    "cmfast/reference/_common.py": [
        ("every region is a transform's", "in_transform._dynamo_marked_constant = True", "in_transform.mark = True",
         "tests/ops/test_compile.py::test_network_inputs_are_laid_out_as_asked"),
    ],
    "cmfast/ops/_dispatch.py": [
        ("graphs of operations have kernels", "    elif native.recorded():\n", "    elif False:\n",
         "tests/ops/test_dispatch.py::test_kernels_are_in_no_graph_of_operations[False]"),
        ("kernels in a region's transforms", """inside torch.compile"
    elif""", """inside torch.compile"
        return None
    elif""", "tests/ops/test_compile.py::test_transforms_in_a_region_have_no_kernels[dropout]"),
    ],
    "kernels/common.py": [
        ("floats stay float64", "return tl.cast(value, tl.float32)", "return value", at("scale_input")),
        ("c_in of a float64", "        sigma_data = as_float32(sigma_data)\n", "", at("scale_input")),
        ("c_skip and c_out of float64s", "= as_float32(sigma_data), as_float32(boundary)", "= sigma_data, boundary",
         at("denoise")),
    ],
    "kernels/precondition.py": [
        ("c_noise expanded in the function", "return model_input, c_noise",
         "return model_input, c_noise.expand(len(x))", _VIEWS.format("scale_input")),
    ],
    "kernels/noise.py": [
        ("c_noise expanded in the function", "return x_t, model_input, c_noise",
         "return x_t, model_input, c_noise.expand(len(x_t))", _VIEWS.format("add_noise")),
    ],
    "kernels/renoise.py": [
        ("sigma_min as it comes", "    sigma_min = as_float32(sigma_min)\n", "", at("renoise")),
    ],
    "kernels/draw.py": [
        ("mean and deviation as they come", "as_float32(mean) + as_float32(std) * z", "mean + std * z",
         at("draw_pair lognormal, one point")),
        ("Below's numbers as they come", "= as_float32(factor), as_float32(k), as_float32(b)", "= factor, k, b",
         at("draw_pair lognormal, by tensors")),
    ],
    "kernels/philox.py": [
        ("a word's method", "tl.cast(value, tl.int64)", "value.to(tl.int64)", at("normal")),
    ],
    "kernels/group_norm.py": [
        ("eps as it comes", "total) + as_float32(eps)", "total) + eps", at("group_norm_silu, 192 of 64x64")),
        ("a size's method", "tl.cast(pixels, tl.int64) * GROUP", "pixels.to(tl.int64) * GROUP",
         at("group_norm_silu, 192 of 64x64")),
    ],
    "kernels/group_norm_bwd.py": [
        ("a size's method", "tl.cast(pixels, tl.int64) * GROUP", "pixels.to(tl.int64) * GROUP",
         at("group_norm_silu, 192 of 64x64")),
    ],
    "kernels/group_norm_tiles.py": [
        ("what dropout scales by, as it comes", "as_float32(keep_scale)", "keep_scale", at("dropout")),
    ],
    "kernels/losses.py": [
        ("the weight's sigma_data as it comes", "            weight_sigma_data = as_float32(weight_sigma_data)\n", "",
         at("consistency_loss karras")),
        ("c as it comes", "        huber_c = as_float32(huber_c)\n", "", at("weighted_loss huber")),
        ("c as it comes, backward", "(distance_ptr + row) + as_float32(huber_c)", "(distance_ptr + row) + huber_c",
         at("weighted_loss huber")),
        ("a count as it comes", "tl.div_rn(total, as_float32(elements))", "tl.div_rn(total, elements)",
         at("weighted_loss l1")),
        ("a count as it comes, backward of l1", "tl.div_rn(scale, as_float32(elements))", "tl.div_rn(scale, elements)",
         at("weighted_loss l1")),
        ("a count as it comes, backward of l2", "2.0 * scale, as_float32(elements))", "2.0 * scale, elements)",
         at("weighted_loss l2")),
    ],
    "kernels/lpips_input.py": [
        ("numbers as they come", "    low, span = as_float32(low), as_float32(span)\n", "", at("lpips_input, forward")),
        ("numbers as they come, backward", "    span = as_float32(span)\n", "", at("lpips_input")),
    ],
    "kernels/optimizer.py": [
        ("numbers as they come", "= as_float32(lr), as_float32(weight_decay), as_float32(max_norm)",
         "= lr, weight_decay, max_norm", at("radam_ema_")),
        ("weights as they come", "= as_float32(weight_1), as_float32(beta_2)", "= weight_1, beta_2", at("radam_ema_")),
    ],
}  # fmt: skip
