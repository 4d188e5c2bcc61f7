"""Operations: dispatch, gradients, the forms for the CPU, the references."""

from tests.faults.ids import T_DISPATCH, T_FORMULAS, T_LAYOUT, T_NORM, here, kernel

T_FORMS = "tests/ops/test_every_op.py::test_what_takes_a_form_for_the_cpu"

NORM_OP = [
    ("x kept where the sum would do", "(total[0], None) if total else (x, x_bias)", "(x, x_bias)",
     T_NORM + "test_only_what_was_normalised_is_kept"),
    ("gradient of the sum not added to that of x", "grad_sum if grads[0] is None else grads[0] + grad_sum", "grad_sum",
     T_NORM + "test_gradients_of_gradients[all]"),
    ("all that is there wants a gradient", "if t is not None and t.requires_grad]", "if t is not None]",
     T_NORM + "test_gradients_of_gradients_of_one_input[x]"),
    ("a kernel for many gradients", "and not stands_for_many(grad, grad_sum)", "",
     T_NORM + "test_many_gradients_at_once[all]"),
    ("groups of Python's integers alone", '_check.whole("num_groups", num_groups)', "0",
     "tests/ops/test_group_norm.py::test_groups_of_numpy"),
    ("parameters taken for noise levels", "*tensors, draw, levels=False)", "*tensors, draw)",
     "tests/ops/test_compile.py::test_group_norm[triton-training-all-a slab]"),
]  # fmt: skip

REFERENCE_NORM = [
    ("variance of a sample", "correction=0", "correction=1",
     "tests/ops/test_group_norm.py::test_is_what_pytorchs_modules_make"),
    ("statistics of the sum before it is rounded", "(total + residual.to(wide)).to(x.dtype)",
     "(total + residual.to(wide))", "tests/ops/test_group_norm.py::test_rounds_once[sum-torch.bfloat16]"),
    ("scale without one", "z * (1 + scale.to(wide)", "z * (scale.to(wide)",
     "tests/ops/test_group_norm.py::test_is_what_pytorchs_modules_make"),
    ("groups of dropout's counters reach over pixels", "groups = -(-count // 4)", "groups = -(-count // 2)",
     "tests/ops/test_group_norm.py::TestDropout::test_words_are_philoxs"),
    ("words below the threshold kept", "word >= min(", "word < min(",
     "tests/ops/test_group_norm.py::TestDropout::test_keeps_as_many_as_it_should"),
]  # fmt: skip

AUTOGRAD = [
    ("results kept for the backward pass returned too", "results[: len(results) - keep]",
     "results[: len(results) - keep + 1]", kernel("weighted_loss l2")),
    ("kept results off by one", "kept = output[len(output) - ctx.keep :]",
     "kept = output[len(output) - ctx.keep - 1 :]", kernel("weighted_loss huber")),
    ("kept distances dropped", '{"saved": held[count : count + ctx.keep]} if ctx.keep else {}', "{}",
     kernel("weighted_loss huber")),
    ("c_noise carries a gradient", "*(() if levels_vary else [output[i] for i in c_noise])", "",
     kernel("euler_step", "the_same_results_carry_gradients", "levels given")),
    ("c_noise never carries a gradient", "() if levels_vary else [output[i] for i in c_noise]",
     "[output[i] for i in c_noise]", kernel("euler_step")),
    ("tensors of inference mode are saved", "x.clone() if x is not None and x.is_inference() else x", "x",
     "tests/kernels/test_every_op.py::test_tensors_made_in_inference_mode[denoise]"),
    ("a kernel for many gradients", "and not stands_for_many(*grads)", "",
     "tests/kernels/test_every_op.py::test_many_gradients_at_once[denoise]"),
    ("a draw that changed", "for part in x] if levels_vary else []", "for part in x] if False else []",
     "tests/kernels/test_every_op.py::test_gradients_of_levels_want_the_draw_as_it_was"),
    ("no gradients of levels", "if needed[i] and results[i] is None", "if False", kernel("denoise")),
    ("one tensor for two inputs gets the gradient of both", "x.view_as(x) if isinstance(x, Tensor)",
     "x if isinstance(x, Tensor)", "tests/kernels/test_every_op.py::test_one_tensor_as_two_inputs"),
]  # fmt: skip

DISPATCH = [
    ("no first launch", "transform_refusal() or launch_refusal(device)", "transform_refusal()",
     T_DISPATCH + "test_nothing_is_launched_for_a_trial_where_it_would_fail"),
    ("a first launch in a transform", "transform_refusal() or launch_refusal(device)",
     "launch_refusal(device) or transform_refusal()",
     T_DISPATCH + "test_nothing_is_launched_for_a_trial_where_it_would_fail"),
    ("a first launch in a capture", "not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()",
     "not torch.cuda.is_available()", T_DISPATCH + "test_nothing_is_launched_for_a_trial_where_it_would_fail"),
    ("a first launch for each call", "if device.index not in _launches:", "if True:",
     T_DISPATCH + "test_where_nothing_can_be_launched_the_reference_serves"),
    ("a full GPU is never launched on again", 'if "out of memory" in str(error).lower():', "if False:",
     "tests/ops/test_dispatch.py::test_a_gpu_that_is_full_is_no_reason"),
    ("a first launch by a mode that looks on", "with _disable_current_modes():", "if True:",
     "tests/ops/test_dispatch.py::test_a_gpu_that_is_full_is_no_reason"),
    ("a backward pass has a backend of its own",
     "if torch.compiler.is_compiling() or _chosen.get() is None:", "if True:",
     "tests/fast/test_changes.py::test_activations_made_again_keep_the_backend[optimised]"),
    ("views that negate", "compiling and tensor.is_neg():", "True:",
     T_DISPATCH + "test_a_view_that_negates_takes_the_reference"),
    ("backend not put back", "_chosen.reset(token)", "pass", T_DISPATCH + "test_backend_nests_and_ends"),
    ("kernels take float64", "KERNEL_DTYPES = (torch.float32,", "KERNEL_DTYPES = (torch.float64, torch.float32,",
     T_DISPATCH + "test_reasons"),
    ("dtypes of inputs not looked at", "[*(tensor.dtype for tensor in tensors if tensor.is_floating_point()), *dtypes]",
     "dtypes", T_DISPATCH + "test_reasons"),
    ("dtypes of results not looked at", "is_floating_point()), *dtypes]", "is_floating_point())]",
     T_DISPATCH + "test_dtypes_of_results_count"),
    ("forms for the CPU where a graph is recorded", "any(x.requires_grad for x in tensors)", "False",
     here("euler_step")),
    ("empty batches in C", " or state.numel() == 0:", ":", T_FORMS + "[group_norm_silu]"),
    ("levels that nobody draws", 'return "C" if by_c else "reference"', 'return "reference"',
     "tests/native/test_noise.py::test_explain_says_who_draws_levels"),
    ("who looks on sees nothing", "if records else not torch._C._len_torch_dispatch_stack()", "if records else True",
     "tests/native/test_steps.py::test_who_looks_on_sees_pytorchs[denoise]"),
]  # fmt: skip

NORM_CPU = [
    ("variances of PyTorch in channels_last trusted", "<= LARGE_MEAN:", "<= float(\"inf\"):",
     "tests/ops/test_group_norm.py::test_large_means_in_channels_last"),
    ("large means stay", "x - of_channels.unflatten(1, (-1, *(1,) * (x.ndim - 2)))", "x",
     "tests/ops/test_group_norm.py::test_the_rule_in_channels_last[PyTorch-1000.0]"),
    ("NaN passes for a small mean", "if not (mean * rstd).abs().max().item() <= LARGE_MEAN:",
     "if (mean * rstd).abs().max().item() > LARGE_MEAN:",
     "tests/ops/test_group_norm.py::test_a_sample_that_is_lost_leaves_the_others_alone[channels_last-nan]"),
    ("the batch overwritten by a sum", "if records or total is x else total.add_(residual)", "if records else "
     "total.add_(residual)", "tests/ops/test_group_norm.py::test_nothing_that_was_given_changes[residual-contiguous]"),
    ("groups of one element refused", "return torch.group_norm(x, num_groups", "return F.group_norm(x, num_groups",
     "tests/ops/test_group_norm.py::test_groups_of_one_element"),
]  # fmt: skip

CHECK = [
    ("small integers of NumPy wrap", "return value if isinstance(value, int) else operator.index(value)",
     "return value", "tests/test_noise.py::test_seeds_and_draws_of_numpy[uint8]"),
    ("a number that varies cannot be traced", "_NUMBERS) and 0 <= value < math.inf)",
     "_NUMBERS) and 0 <= value and math.isfinite(value))",
     "tests/ops/test_every_op.py::test_one_graph_for_any_number[denoise]"),
    ("a tensor is out of range", '        _no_tensor("sigma_data", sigma_data)\n', "",
     T_FORMULAS + "test_a_tensor_is_no_number"),
    ("shapes of Python's integers alone", "torch.SymInt, Integral)", "torch.SymInt)",
     T_FORMULAS + "test_integers_of_numpy"),
    ("an infinite level to divide by", "if divides and high == math.inf:", "if False:",
     T_FORMULAS + "test_what_divides_by_the_level_refuses_zero_and_infinity[inf-must be finite]"),
    ("a level of 0 to divide by", "(low > 0 if divides else low >= 0)", "(low >= 0)",
     T_FORMULAS + "test_what_divides_by_the_level_refuses_zero_and_infinity[0.0-must be positive]"),
]  # fmt: skip

NOISE_OPS = [
    ("uniform_int of any seed", '_check.integer("seed", seed, index.device)', "seed",
     "tests/test_noise.py::test_seeds_that_are_none[True]", 2, 2),
]  # fmt: skip

REFERENCE_PRECONDITION = [
    ("the state laid out as a denoiser's output", "laid_out_as(model_output.to(wide), x_t)", "model_output.to(wide)",
     T_LAYOUT + "[multistep-contiguous-few]"),
    ("a denoiser's output itself", "copy=sigma_data is None and not clip)", "copy=False)",
     T_FORMULAS + "test_results_are_tensors_of_their_own[reference]"),
    ("c_skip without the boundary", "sigma_data**2) / (offset**2 + sigma_data**2)",
     "sigma_data**2) / (sigma**2 + sigma_data**2)", "tests/test_golden.py::test_scalings_and_denoise[bc]"),
    ("c_skip by a reciprocal", "torch.full_like(offset, sigma_data**2) /", "sigma_data**2 /",
     "tests/test_edges.py::test_scalings_at_any_boundary[torch.float32]"),
    ("c_out without the boundary", "c_out = sigma_data * offset /", "c_out = sigma_data * sigma /",
     "tests/test_golden.py::test_scalings_and_denoise[bc]"),
    ("levels squared in their own dtype", "dtype, sigma = sigma.dtype, sigma.to(compute_dtype(sigma))\n    offset",
     "dtype = sigma.dtype\n    offset", "tests/test_edges.py::test_levels_in_half_precision[torch.float16]"),
    ("c_in: root missing", "c_in = 1 / (sigma**2 + sigma_data**2) ** 0.5", "c_in = 1 / (sigma**2 + sigma_data**2)",
     "tests/test_golden.py::test_scalings_and_denoise[edm]"),
    ("EDM's c_noise", "250.0 * torch.log(sigma + 1e-44)", "0.25 * torch.log(sigma + 1e-44)", T_FORMULAS + "test_steps"),
    ("an infinite state reaches a denoiser", "laid_out_as(model_output.to(wide), x_t), clip)",
     "0 * x_t.to(wide) + model_output.to(wide), clip)",
     T_FORMULAS + "test_a_function_is_its_own_denoiser"),
]  # fmt: skip

REFERENCE_LOSSES = [
    ("snr = 1 / sigma", "snr_weight(sigma**-2,", "snr_weight(sigma**-1,",
     "tests/test_golden.py::test_loss_weights[snr]"),
    ("karras weight: a square missing", "snr + 1.0 / sigma_data**2", "snr + 1.0 / sigma_data",
     "tests/test_golden.py::test_loss_weights[karras]"),
    ("truncated snr: minimum for maximum", "snr.clamp(min=1)", "snr.clamp(max=1)",
     "tests/test_golden.py::test_loss_weights[truncated-snr]"),
    ("huber without minus c", ".sqrt(), 0) - huber_c", ".sqrt(), 0)", T_FORMULAS + "test_distances"),
    ("huber has slope NaN at 0", "torch.where(positive, radicand, 1).sqrt()", "radicand.sqrt()",
     T_FORMULAS + "test_huber_without_c_has_gradient_zero_at_zero"),
    ("l2 not squared", "distance = delta.square().mean(1)", "distance = delta.abs().mean(1)",
     T_FORMULAS + "test_distances"),
]  # fmt: skip

T_WORDS = "tests/reference/test_philox.py::"

REFERENCE_PHILOX = [
    ("a seed has one shape", "seed.to(torch.int64).reshape(())", "seed.to(torch.int64)",
     T_WORDS + "test_words_of_tensors"),
    ("nine rounds of Philox", "for _ in range(ROUNDS):", "for _ in range(ROUNDS - 1):",
     T_FORMULAS + "TestCounterNoise::test_philox_known_answers"),
    ("a digit of a multiplier", "0xCD9E8D57", "0xCD9E8D37",
     T_FORMULAS + "TestCounterNoise::test_philox_known_answers"),
    ("high word of the key is 0", "seed & MASK, (seed >> 32) & MASK\n", "seed & MASK, 0\n",
     T_FORMULAS + "TestCounterNoise::test_philox_known_answers"),
    ("high word of the index ignored", "((index >> 32) & MASK).expand(shape)", "(index * 0).expand(shape)",
     T_WORDS + "test_numpys_words[a few]"),
    ("draw ignored", "draw_word.expand(shape)", "(0 * draw_word).expand(shape)",
     T_WORDS + "test_numpys_words[a few]"),
    ("words of mps made there", "return tuple(word.to(index.device) for", "return tuple(word for",
     "tests/test_noise.py::test_a_device_without_float64_gets_the_noise_of_the_cpu"),
    ("high word of NumPy's key is 0", "[seed & MASK, (seed >> 32) & MASK], np", "[seed & MASK, 0], np",
     T_WORDS + "test_numpys_words[a few]"),
    ("halves in one order", "keys[1::2] = keys[1::2, ::-1]", "pass", T_WORDS + "test_numpys_words[a few]"),
    ("the first block alone", "for start in range(0, counters, _BLOCK):", "for start in range(0, 1):",
     T_WORDS + "test_numpys_words[two blocks and a tail]"),
    ("an index of 32 bits", "samples >> _WORD", "samples & np.uint64(0)", T_WORDS + "test_numpys_words[a few]"),
    ("transforms by NumPy", "if watched() or in_transform():", "if watched():",
     T_WORDS + "test_where_numpy_stays_away[vmap]"),
    ("modes by NumPy", "if watched() or in_transform():", "if in_transform():",
     T_WORDS + "test_where_numpy_stays_away[a mode]"),
    ("traces by NumPy", "if watched() or in_transform():", "if in_transform():",
     T_WORDS + "test_where_numpy_stays_away[trace]"),
    ("one thread where there are many", "torch.get_num_threads() <= _FEW_THREADS", "True",
     T_WORDS + "test_where_torch_has_threads"),
]  # fmt: skip

REFERENCE_NOISE = [
    ("float64 where there is none", "    if index.device.type in ON_CPU:", "    if False:",
     "tests/test_noise.py::test_a_device_without_float64_gets_the_noise_of_the_cpu"),
    ("radius without the factor 2", "torch.sqrt(-2 * torch.log(", "torch.sqrt(-torch.log(",
     T_FORMULAS + "TestCounterNoise::test_is_normal"),
    ("sigma_min forgotten in the noise's scale", "((level - sigma_min) * (level + sigma_min))", "(level * level)",
     T_FORMULAS + "test_renoise"),
    ("c_in of the noise's level", "level = sigma if input_sigma is None else input_sigma", "level = sigma",
     here("add_noise churn")),
]  # fmt: skip

REFERENCE_SOLVERS = [
    ("heun: sum of the slopes, not their mean", "0.5 * (d + d_next) * dt", "(d + d_next) * dt",
     T_FORMULAS + "test_steps"),
    ("heun: NaN at the end", "torch.where(at_zero, torch.ones_like(next_sigma), next_sigma)", "next_sigma",
     T_FORMULAS + "test_heun_is_euler_where_the_next_level_is_zero"),
    ("midpoint by the first slope", "x_t.to(wide) + d_mid * dt", "x_t.to(wide) + d * dt", T_FORMULAS + "test_steps"),
    ("slope over the next level", "(x.to(wide) - denoised) / per_sample(sigma, x, wide)",
     "(denoised - x.to(wide)) / per_sample(sigma, x, wide)", T_FORMULAS + "test_steps"),
]  # fmt: skip

REFERENCE_IMAGES = [
    ("NaN becomes 255", "nan_to_num(nan=0.0)", "nan_to_num(nan=255.0)", T_FORMULAS + "test_to_uint8"),
    ("pixels not clamped", ".clamp(0, 255)", "", T_FORMULAS + "test_to_uint8"),
    ("trunc and nearest swapped", 'if rounding == "nearest":', 'if rounding == "trunc":', T_FORMULAS + "test_to_uint8"),
]  # fmt: skip

REFERENCE_LPIPS = [
    ("mean over the channels", ".sum(1).mean((1, 2))", ".mean((1, 2, 3))",
     "tests/ops/test_lpips.py::test_layer_is_the_formula"),
]  # fmt: skip

FAULTS = {
    "cmfast/ops/_autograd.py": AUTOGRAD,
    "cmfast/ops/group_norm.py": NORM_OP,
    "cmfast/ops/_dispatch.py": DISPATCH,
    "cmfast/ops/_norm_cpu.py": NORM_CPU,
    "cmfast/ops/_check.py": CHECK,
    "cmfast/ops/noise.py": NOISE_OPS,
    "cmfast/reference/precondition.py": REFERENCE_PRECONDITION,
    "cmfast/reference/losses.py": REFERENCE_LOSSES,
    "cmfast/reference/philox.py": REFERENCE_PHILOX,
    "cmfast/reference/noise.py": REFERENCE_NOISE,
    "cmfast/reference/solvers.py": REFERENCE_SOLVERS,
    "cmfast/reference/images.py": REFERENCE_IMAGES,
    "cmfast/reference/group_norm.py": REFERENCE_NORM,
    "cmfast/reference/lpips.py": REFERENCE_LPIPS,
}
