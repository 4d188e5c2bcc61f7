"""C for CPUs: its compilation, and Winograd's convolution, normalisation, attention, noise, steps and losses."""

from tests.faults.ids import T_FORMULAS

_FAST = "tests/fast/test_optimize.py::test_"
_MEMORY = "tests/fast/test_memory.py::test_"
_PACKING = "tests/fast/test_packing.py::test_"
_WINOGRAD = "tests/native/test_winograd.py::test_"
_NATIVE = "tests/native/test_native.py::test_"
_NORM = "tests/native/test_group_norm.py::test_"
_STEPS = "tests/native/test_steps.py::test_"
_EVERY = "tests/ops/test_every_op.py::test_"
_TRUNK = "tests/test_perceptual_cpu.py::test_"

WINOGRAD = [
    ("narrow for wide", " * sum(channels)", "", _WINOGRAD + "what_it_does_not_do[narrow]"),
    ("few tiles", " >= LEAST_TILES * torch.get_num_threads()", " >= 1", _WINOGRAD + "what_it_does_not_do[few tiles]"),
    ("filters of one pass for few pixels", "(kept or batch", "(True or batch", _WINOGRAD + "what_it_does"),
    ("memory of this call alone", "space = (workspace or Workspace()).take(threads * made.room", "space = "
     "Workspace().take(threads * made.room", _WINOGRAD + "memory_is_used_again_for_another_shape"),
    ("one memory for all threads", "class Workspace(threading.local):", "class Workspace:",
     _MEMORY + "memory_of_convolutions_goes_with_the_thread_and_the_network"),
    ("bfloat16 transformed", "        h.dtype == DTYPE\n        and _tiles", "        _tiles",
     _PACKING + "weights_are_packed_in_bfloat16[False]"),
    ("nobody looks on", "        and not native.watched()\n", "", _FAST + "no_idle_passes"),
    ("one gradient for many", " or stands_for_many(grad)", "", _WINOGRAD + "many_gradients_at_once"),
    ("any memory", "    if x.dtype != DTYPE or x.device", "    if False and x.device",
     _WINOGRAD + "what_c_must_not_be_given[float64]"),
    ("any number of channels", "not any(count % VECTOR for count in channels)", "True",
     _WINOGRAD + "what_it_does_not_do[vectors]"),
    ("strides and paddings", "(conv.stride, conv.padding) == ((1, 1), (1, 1))", "True",
     _WINOGRAD + "what_it_does_not_do[stride]"),
    ("blocks as large as they come", "each = -(-each // -(-each // BLOCK)) if each else 1", "each = max(each, 1)",
     _WINOGRAD + "blocks"),
    ("filters that are not turned", "ctx.filters, turned=True)", "ctx.filters)",
     _WINOGRAD + "gradients[(2, 64, 32, 6, 10)-as it is]"),
    ("no gradient of the residual", "grad if wanted[3] else None", "None",
     _WINOGRAD + "gradients[(2, 64, 32, 6, 10)-as it is]"),
    ("a gradient of the large image", "        if doubled and found[0] is not None:", "        if False:",
     _WINOGRAD + "gradients[(2, 64, 32, 6, 10)-doubled]"),
    ("PyTorch's gradient of the small image", "if doubled else h\n            geometry",
     "if False else h\n            geometry", _WINOGRAD + "gradients_of_gradients[doubled]"),
    ("gradients that end", "if not (torch.is_grad_enabled() or", "if not (False or",
     _WINOGRAD + "gradients_of_gradients[as it is]"),
    ("any number of sums", " and torch.get_num_threads() * weight.numel() * 16 // 9 <= MOST_SUMS", "",
     _WINOGRAD + "sums_that_would_be_too_many[as it is]"),
    ("filters of what a weight was", "kept.seen != (weight.data_ptr(), weight._version)", "False",
     _TRUNK + "weights_that_change_are_seen[written to]"),
    ("a gradient's sign", "grad.resolve_neg()", "grad", _WINOGRAD + "a_gradient_that_is_negated_where_it_is_read"),
    ("filters for ever", "lambda _: everything.pop(key, None)", "lambda _: None",
     _WINOGRAD + "filters_go_with_their_weight"),
    ("filters of memory given up", " or kept.storage.expired():", ":", _WINOGRAD + "filters_of_memory_given_up"),
    ("filters that nobody counts", "if weight.is_inference():", "if False:", _WINOGRAD + "filters_of_inference_mode"),
    ("an input in another layout", "h = h.contiguous(memory_format=form)", "pass",
     _WINOGRAD + "values[(2, 64, 32, 6, 10)-AVX2-as it is]"),
    ("a residual in another layout", "residual.contiguous(memory_format=form)", "residual",
     _WINOGRAD + "values[(2, 64, 32, 6, 10)-AVX2-as it is]"),
]

_EVEN, _ODD = (_WINOGRAD + f"values[{shape}-AVX2-as it is]" for shape in ("(2, 64, 32, 6, 10)", "(3, 32, 48, 7, 5)"))
_OF_WEIGHT = _WINOGRAD + "gradient_of_the_weight[(3, 32, 48, 7, 5)-AVX2-as it is]"

WINOGRAD_C = [
    ("wrong sign of an input", "h[2][j] = d[2][j] - d[1][j];", "h[2][j] = d[2][j] + d[1][j];", _EVEN),
    ("wrong sign of an output", "h[1][j] = m1 - m2 -", "h[1][j] = m1 - m2 +", _EVEN),
    ("wrong filter", "h[2][j] = 0.5f * (g[j] + g[6 + j] - g[3 + j]);", "h[2][j] = 0.5f * (g[j] + g[6 + j] + g[3 + j]);",
     _EVEN),
    ("pixels beyond the image", "        return zeros;", "        return x;", _EVEN),
    ("a doubled image as it is", "(w >> doubled)) * channels", "w) * channels",
     _WINOGRAD + "values[(2, 64, 32, 6, 10)-AVX2-doubled]"),
    ("what there is of other places", "doubled && p < 16", "0 && p < 16",
     _WINOGRAD + "values[(2, 64, 32, 6, 10)-AVX2-doubled]"),
    ("too many places are empty", "((place) / 4 == 2 || (place) % 4 == 2)", "((place) / 4 == 2 || (place) % 4 == 1)",
     _WINOGRAD + "values[(2, 64, 32, 6, 10)-AVX2-doubled]"),
    ("outputs beyond the image", "if (top + i / 2 >= height ||", "if (top + i / 2 > height ||",
     _WINOGRAD + "memory_around_is_left_alone[AVX2]"),
    ("zeros that are not", "        memset(zeros, 0, channels * sizeof(float));\n", "",
     _WINOGRAD + "memory_around_is_left_alone[AVX2]"),
    ("a panel that is not full", "k < PANEL && panel + k < outputs; k", "k < PANEL; k",
     _WINOGRAD + "memory_around_is_left_alone[AVX512]"),
    ("one bias for every panel", "load(bias + panel + k)", "load(bias + k)", _ODD),
    ("one memory for all threads", "float *inputs = space + omp_get_thread_num() * winograd_room(channels, block);",
     "float *inputs = space;", _WINOGRAD + "bits_of_threads"),
    ("sums begin with what was there", "        memset(sums, 0, size * sizeof(float));\n", "", _OF_WEIGHT),
    ("sums of a thread alone", "thread < team; thread++", "thread < 1; thread++", _WINOGRAD + "bits_of_threads"),
    ("threads that there are not", "int team = omp_get_num_threads();", "int team = threads;",
     _WINOGRAD + "fewer_threads_than_were_asked_for"),
    ("threads take what comes", "#pragma omp for schedule(static)\n", "#pragma omp for schedule(dynamic)\n",
     _WINOGRAD + "bits_of_threads"),
    ("wrong sign of a gradient", "h[3][j] = -g[1][j];", "h[3][j] = g[1][j];", _OF_WEIGHT),
    ("tiles of the block before", "sums + (panel * 16 + p) * apart + c * PANEL, count);",
     "sums + (panel * 16 + p) * apart + c * PANEL, block);",
     _WINOGRAD + "gradient_of_the_weight[(5, 16, 64, 14, 9)-AVX2-as it is]"),
]

COMPILING = [
    ("compiled in every process", "if folder is not None:\n        with contextlib.suppress(OSError):  # it is",
     "if False:\n        with contextlib.suppress(OSError):  # it is",
     _NATIVE + "compiled_once"),
    ("what is kept is never old", "repr((files, to_object", "repr((to_object", _NATIVE + "compiled_once"),
    ("any dtype", "x.dtype not in dtypes or ", "", _EVERY + "what_takes_a_form_for_the_cpu[lpips_layer]"),
    ("views that negate", "keys_of(x).raw_repr() not in plain", "not x.is_cpu",
     _EVERY + "what_takes_a_form_for_the_cpu[weighted_loss]"),
    ("many gradients that look like one", "keys_of(x).raw_repr() not in plain", "not x.is_cpu",
     _STEPS + "a_hook_of_many_gradients"),
    ("what wraps memory", "keys_of(x).raw_repr() not in plain", "not x.is_cpu",
     _NATIVE + "what_lies_in_memory"),
    ("subclasses", "type(x) not in _CLASSES or ", "", _NATIVE + "what_lies_in_memory"),
    ("none of inference mode", "for mode in (False, True):", "for mode in (False,):", _NATIVE + "what_lies_in_memory"),
    ("what a mode makes at first", "with _disable_current_modes():", "if True:",
     _NATIVE + "what_lies_in_memory_is_asked_before_a_mode"),
    ("every thread compiles", "with _one_at_a_time:", "if True:", _NATIVE + "threads_compile_once"),
    ("the parent's lock", "    _one_at_a_time = threading.RLock()\n\n\nif", "    pass\n\n\nif",
     _NATIVE + "a_fork_while_another_thread_compiles"),
    ("no thread, no answer", "(OSError, RuntimeError, subprocess", "(OSError, subprocess",
     _NATIVE + "where_no_thread_can_be_begun"),
    ("headers that are never old", 'sources.glob("*.[ch]")', 'sources.glob("*.c")',
     _NATIVE + "all_files_of_a_folder"),
    ("what others put there is run", "or (others and not kept_apart)", "",
     _NATIVE + "nothing_is_kept_where_it_is_not_safe[others may write]"),
    ("what others put in a folder's place is run", "for each in (folder, *folder.parents):", "for each in (folder,):",
     _NATIVE + "nothing_is_kept_where_it_is_not_safe[others may put another there]"),
    ("an OpenMP of its own", '("-shared",)', '("-shared", "-fopenmp")', _NATIVE + "the_threads_are_those_of_pytorch"),
    ("any CPU", "if cpu not in FLAGS:", "if False:", _NATIVE + "other_machines[Linux-DEFAULT]"),
    ("the compiler's first words", 'if "error" in line', "if line", _NATIVE + "a_fault_in_the_source_is_named"),
]

_NORM_OF, _NORM_PLAIN = (_NORM + f"values_and_gradients[(2, 192, 9, 7)-32-AVX2-torch.float32-{kind}]"
                         for kind in ("film", "plain"))  # fmt: skip
_NORM_HALF = _NORM + "values_and_gradients[(2, 192, 9, 7)-32-AVX2-torch.bfloat16-film]"

GROUP_NORM_C = [
    ("differences to nothing", "to[c] = number(x, first * channels + g * each, half);", "to[c] = 0;",
     _NORM + "means_larger_than_deviations[1000000.0]"),
    ("means of float32", "rest[g] = (float)((mean[g] - one) * rstd[g]);", "rest[g] = 0;",
     _NORM + "means_larger_than_deviations[-10000.0]"),
    ("a sigmoid that never ends", "choose(z < -88.0f, (vec){0}, 1.0f / (1.0f + exponential(-z)))",
     "1.0f / (1.0f + exponential(-z))", _NORM + "silu_of_large_numbers[AVX2]"),
    ("sums of float32", "two[2 * v + i] += each * each;", "two[2 * v + i] ="
     " __builtin_convertvector(__builtin_convertvector(two[2 * v + i] + each * each, few), wide);",
     _NORM + "means_larger_than_deviations[-10000.0]"),
    ("means of all pixels of a part", "one /= (double)each * pixels;", "one /= (double)each;", _NORM_OF),
    ("eps outside the root", "sqrt((two < 0 ? 0 : two) + eps)", "(sqrt(two < 0 ? 0 : two) + eps)", _NORM_OF),
    ("variance and mean square", "two / ((double)each * pixels) - one * one", "two / ((double)each * pixels)",
     _NORM_OF),
    ("scale without one", "scale ? 1.0f + scale[c] : 1.0f", "scale ? scale[c] : 1.0f", _NORM_OF),
    ("bias unscaled", "bias[c] * more", "bias[c]", _NORM_OF),
    ("the first sample's shift", "it->shift ? it->shift + b * it->channels : 0", "it->shift", _NORM_OF),
    ("channels of the next group", "= mean[g];", "= mean[(g + 1) % groups];", _NORM_OF),
    ("no SiLU", "                z *= sigmoid(z);", "                z *= 1.0f;", _NORM_PLAIN),
    ("the slope of a sigmoid", "g *= s * (1.0f + z * (1.0f - s));\n            }\n            if (!half)",
     "g *= s * (1.0f - s);\n            }\n            if (!half)", _NORM_PLAIN),
    ("the slope of a sigmoid, in bfloat16", "g *= s * (1.0f + z * (1.0f - s));\n            }\n            g = g",
     "g *= s * (1.0f - s);\n            }\n            g = g", _NORM_HALF),
    ("the mean's gradient forgotten", "g = g * factor - load(of_groups + c) -", "g = g * factor -", _NORM_OF),
    ("the deviation's gradient forgotten", " - h * load(of_groups + channels + c);", ";", _NORM_OF),
    ("a part that is not full", "return (pixels + each - 1) / each;", "return pixels / each;", _NORM_OF),
    ("bfloat16 cut off", "bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;", "bits = bits >> 16;",
     _NORM + "bfloat16_is_rounded_once[AVX2]"),
    ("NaN rounded to a number", "(bits & ~nan) | (0x7fc0 & nan)", "bits", _NORM + "nan_stays_nan_in_bfloat16"),
]

GROUP_NORM = [
    ("contiguous images", "        and x.movedim(1, -1).is_contiguous()\n", "",
     _NORM + "what_it_does_not_do[contiguous]"),
    ("any number of channels", "        and x.shape[1] % LINE == 0\n", "", _NORM + "what_it_does_not_do[no line]"),
    ("nothing at all", "        and x.numel() > 0\n", "", _NORM + "what_it_does_not_do[empty]"),
    ("any dtype", "x.dtype in DTYPES", "True", _NORM + "what_it_does_not_do[float64]"),
    ("a trace of it", "        and not native.traced()\n", "", _NORM + "a_trace_is_not_of_it"),
    ("who looks on sees nothing", "    if not native.watched():\n        return forward",
     "    if True:\n        return forward",
     _NORM + "who_looks_on_sees_pytorchs[False-forward]"),
    ("who looks on later sees nothing", "is None or native.watched():", "is None:",
     _NORM + "a_gradient_that_is_traced"),
    ("what is saved as it lies", "for each in (x, grad.to(x.dtype).resolve_neg()))",
     "if each is not x else x for each in (x, grad.to(x.dtype).resolve_neg()))",
     _NORM + "what_is_saved_in_another_layout[flat]"),
    ("a gradient's sign", ".resolve_neg()", "", _NORM + "a_gradient_that_is_negated_where_it_is_read"),
    ("without a compiler", "        and refusal() is None\n", "", _NORM + "a_network_without_a_compiler"),
    ("a gradient as it lies", "for each in (x, grad.to(x.dtype).resolve_neg()))",
     "if each is x else each for each in (x, grad.to(x.dtype).resolve_neg()))", _NORM + "the_operation_takes_it"),
    ("parameters in their own dtype", "x.float().contiguous()", "x.contiguous()", _NORM + "the_operation_takes_it"),
    ("halves of a projection as they lie", "x.float().contiguous()", "x.float()", _NORM_OF),
    ("gradients of weights unscaled", "(of_h * factor).sum(0)", "of_h.sum(0)", _NORM_OF),
    ("the scale's gradient without the bias", " + of_z * bias.float()", "", _NORM_OF),
]

COMMON = [
    ("an exponential's series cut off", "series = series * r + 1.0f / 24;", "series = series * r;",
     _NORM + "silu_of_large_numbers[AVX2]"),
    ("a logarithm in one part", "x - n * 0.693359375f + n * 2.12194440e-4f", "x - n * 0.693359375f",
     _NORM + "silu_of_large_numbers[AVX2]"),
    ("exponents beyond float32's", "x = choose(x < least, least, choose(x > most, most, x));", "",
     _NORM + "silu_of_large_numbers[AVX2]"),
]

_ATTENTION = "tests/native/test_attention.py::test_"
_ATTENTION_ODD = _ATTENTION + "values[(1, 37, 2, 64)-AVX2-1.0]"

ATTENTION_C = [
    ("unscaled", "+ column + d] * scale;", "+ column + d];", _ATTENTION_ODD),
    ("keys for values", "pack_values(keys + width,", "pack_values(keys,", _ATTENTION_ODD),
    ("every sample's keys those of the first", "(head / heads * tokens * 3 + 1) * width", "width",
     _ATTENTION + "values[(3, 64, 1, 96)-AVX2-1.0]"),
    ("the largest of some", "(long t = whole; t < tokens; t++)\n        largest", "(long t = 0; 0;)\n        largest",
     _ATTENTION + "products_beyond_what_an_exponential_takes[1-AVX2]"),
    ("a sum of some", "for (long t = whole; t < tokens; t++)\n        sum", "for (long t = 0; 0;)\n        sum",
     _ATTENTION_ODD),
    ("values summed to the last", "t += DEPTH", "t += padded(tokens)", _ATTENTION + "values[(1, 700, 2, 32)-AVX2-1.0]"),
    ("one room for all threads", "rooms + omp_get_thread_num() * room(tokens, dim)", "rooms",
     _ATTENTION + "same_bits_for_any_batch_and_threads"),
]

ATTENTION = [
    ("any dtype", "qkv.dtype == DTYPE", "True", _ATTENTION + "what_it_does_not_do[float64]"),
    ("any size", "        and qkv.shape[-1] % PANEL == 0\n", "", _ATTENTION + "what_it_does_not_do[size]"),
    ("any strides", "        and qkv.is_contiguous()\n", "", _ATTENTION + "what_it_does_not_do[strides]"),
    ("gradients that end", "        and not (torch.is_grad_enabled() and qkv.requires_grad)\n", "",
     _ATTENTION + "layers_of_a_network[True]"),
    ("any number of tokens", "        and qkv.shape[1] <= MOST_TOKENS\n", "",
     _ATTENTION + "what_it_does_not_do[tokens]"),
    ("nobody looks on", "        and not native.watched()\n", "", _ATTENTION + "who_looks_on_sees_pytorchs"),
]

_NOISE = "tests/native/test_noise.py::test_"
_NOISE_BITS = _NOISE + "bits[0-0-(3, 64, 61)-AVX2]"

NOISE_C = [
    ("a round too few", "round < 10", "round < 9", _NOISE_BITS),
    ("halves of a product changed over", "c[0] = (two >> 32) ^ c[1] ^ k0;", "c[0] = (one >> 32) ^ c[1] ^ k0;",
     _NOISE_BITS),
    ("the seed's high word forgotten", "k1 = (unsigned)(seed >> 32);", "k1 = 0;",
     _NOISE + "bits[9223372049200454709-7-(3, 64, 61)-AVX2]"),
    ("the sample's high word forgotten", "(unsigned)(sample >> 32)", "0u", _NOISE_BITS),
    ("the draw forgotten", "c[1] = (words){0} + draw;", "c[1] = (words){0} + 0 * draw;",
     _NOISE + "bits[9223372049200454709-7-(3, 64, 61)-AVX2]"),
    ("words not rounded", "u = rounded(rounded(number(a)) *", "u = rounded(number(a) *", _NOISE + "bits_of_many[AVX2]"),
    ("uniforms not rounded", "rounded(rounded(number(a)) * 0x1p-32 + 0x1p-33)",
     "(rounded(number(a)) * 0x1p-32 + 0x1p-33)", _NOISE + "bits_of_many[AVX2]"),
    ("a logarithm's series cut off", "sum = sum * q + 1.0 / 11;", "sum = sum * q;",
     _NOISE + "bits_of_many[AVX2]"),
    ("a quarter of a turn cut off", "1.57079632679489655800", "1.5707963267948", _NOISE + "bits_of_many[AVX2]"),
    ("a sine's sign", "of_sine = (quarter & 2) << 62", "of_sine = (quarter & 1) << 63", _NOISE_BITS),
    ("numbers beyond the last", "if (at + i * 4 + j < count)", "if (1)",
     _NOISE + "nothing_beyond_is_written[33-AVX2]"),
    ("thresholds below a word alone", "thresholds[middle] <= word", "thresholds[middle] < word",
     _NOISE + "levels[AVX2-thresholds]"),
    ("one threshold more", "passed(thresholds, intervals - 1, word)", "passed(thresholds, intervals, word)",
     _NOISE + "levels[AVX2-thresholds]"),
    ("every second level", "next[i] = table[(at + 1) * stride];", "next[i] = table[at + 1];",
     _NOISE + "levels[AVX2-halved]"),
    ("levels below zero", "rest < 0 ? 0 : rest", "rest", _NOISE + "levels[AVX2-none below]"),
    ("a slope of the other sign", "exp(b * sigma[i])", "exp(-b * sigma[i])", _NOISE + "levels[AVX2-below]"),
    ("a deviation of one", "exp(mean + std * z)", "exp(mean + z)", _NOISE + "levels[AVX2-lognormal]"),
]

LEVELS = [
    ("levels of tensors", '_check.finite("levels.mean", levels.mean)', "pass", _NOISE + "levels_of_no_numbers[mean]"),
    ("a tuple below", "not isinstance(levels.below, Below)", "False", _NOISE + "levels_of_no_numbers[a tuple]"),
    ("levels before who looks on", " or native.watched()", "", _NOISE + "levels_that_c_does_not_draw"),
    ("no gradient of a table", "not there or recorded or", "not there or", _NOISE + "levels_that_c_does_not_draw"),
    ("any table", " and plain_on_cpu(tables)", "", _NOISE + "levels_that_c_does_not_draw"),
    ("any dtype of levels", "there = dtype == torch.float32 and", "there =", _NOISE + "levels_that_c_does_not_draw"),
]

NOISE_LEVELS = [
    ("thresholds with gaps", "thresholds.contiguous()", "thresholds", _NOISE + "levels[AVX2-lies apart]"),
    ("a table with gaps", "of.table.contiguous()", "of.table", _NOISE + "levels[AVX2-lies apart]"),
    ("levels by the noise's own words", "draw._replace(draw=level_draw(draw))", "draw",
     _NOISE + "levels[AVX2-lognormal]"),
]

NOISE = [
    ("who looks on sees nothing", " or native.watched()", "", _NOISE + "who_looks_on_sees_pytorchs"),
    ("any dtype", " or dtype != torch.float32:", ":", _NOISE + "operations[normal-torch.bfloat16-numbers]"),
    ("without a compiler", " or native_noise.refusal() is not None", "", _NOISE + "without_a_compiler"),
    ("noise of the reference for its steps", "inputs = tuple(_made(x, shape, dtype) if isinstance(x, Draw) else x for x"
     " in inputs)", "pass", _NOISE + "operations[renoise-torch.bfloat16-numbers]"),
]



def _of(case: str, shape: str = "(2, 3, 80, 75)") -> str:
    """A test of a step's values, and of a loss's gradients."""
    return f"{_STEPS}values_and_gradients[AVX2-{shape}-{case}]"


SCALINGS_H = [
    ("c_skip with sigma for sigma - boundary", "square / (offset * offset + square)",
     "square / (sigma * sigma + square)", _of("denoise")),
    ("c_out with the whole sigma", "(float)sigma_data * offset / root", "(float)sigma_data * sigma / root",
     _of("denoise")),
    ("no x for any network", "it.bits = ~0u;", "it.bits = 0;", _of("denoise")),
    ("an infinite x in a network that is D", "seen.bits &= by.bits;", "",
     T_FORMULAS + "test_a_function_is_its_own_denoiser[auto]"),
    ("no clamp from above", "d > by.most ? by.most : d", "d", _of("denoise clipped")),
    ("clamped wherever it is not asked for", "clip ? -1 : -INFINITY", "-1", _of("denoise")),
]

STEPS_C = [
    ("no noise", "to[i] = x[i] + added * e[i];", "to[i] = x[i];", _of("add_noise")),
    ("renoise: the level's own noise", "square = (t - least) * (t + least)", "square = t * t", _of("renoise")),
    ("renoise: NaN below sigma_min", "square < 0 ? 0 : sqrtf(square)", "sqrtf(square)", T_FORMULAS + "test_renoise"),
    ("another point's input", "kind == INPUT ? x + at : to", "x + at", _of("euler_step")),
    ("the input at the level of the state", ": scalings_of(t, sigma_data, boundary, clip).in",
     ": scalings_of(s, sigma_data, boundary, clip).in", _of("euler_step")),
    ("an Euler step backwards", "/ sigma * dt;\n        break;", "/ sigma * -dt;\n        break;", _of("euler_step")),
    ("heun: the first slope alone", "0.5f * (d + d2)", "0.5f * (d + d)", _of("heun_corrector")),
    ("heun: D of the second output at the first state", "denoised(euler, f2[i], by2)", "denoised(x[i], f2[i], by2)",
     _of("heun_corrector")),
    ("heun: a second slope at the end", "kind == HEUN && t == 0", "kind == HEUN && t < 0",
     _of("heun_corrector end")),
    ("midpoint: the whole way first", "/ sigma * to_middle", "/ sigma * dt", _of("midpoint_corrector")),
    ("the first sample's level", "float s = level(start, b)", "float s = level(start, 0)", _of("denoise")),
    ("a part's end beyond the sample", "(part + 1 < parts ? (part + 1) * PART : count);\n            for (long at",
     "(part + 1 < parts ? (part + 1) * PART : count + 1);\n            for (long at",
     _STEPS + "nothing_beyond_is_written[denoise-33-AVX2]"),
    ("c_noise without 250", "250.0f * (float)log", "(float)log", _of("scale_input")),
    ("every block's noise is the first's", "seed, draw, at - b * count, n)", "seed, draw, 0, n)", _of("renoise drawn")),
    ("the first sample's noise", "drawn(noise, index[b],", "drawn(noise, index[0],", _of("add_noise drawn")),
    ("a second point at the level of the first", "s, m, t, m, by, by2, n);", "s, m, t, s, by, by2, n);",
     _of("add_noise_pair")),
    ("a second input at the level of the first", "scale(input2 + at, next2 + at, by2.in, n);",
     "scale(input2 + at, next2 + at, in, n);", _of("add_noise_pair")),
    ("pixels rounded always", "if (nearest)", "if (1)", _STEPS + "pixels_are_those_of_the_reference[AVX2]"),
    ("NaN is white", "room[i] > 0.0f ? room[i] < 255.0f ? room[i] : 255.0f : 0.0f;",
     "room[i] < 255.0f ? room[i] > 0.0f ? room[i] : 0.0f : 255.0f;",
     _STEPS + "pixels_are_those_of_the_reference[AVX2]"),
    ("channels where they were", "to[(b * pixels + begin + i) * channels + c]",
     "to[(b * channels + c) * pixels + begin + i]", _STEPS + "pixels_of_an_output[AVX2-contiguous]"),
]

LOSSES_C = [
    ("target's D at the student's level", "x2 ? scalings_of(level(end, b), sigma_data, boundary, 0) : by;", "by;",
     _of("consistency_loss uniform"), 2),
    ("target's D at the student's level, in the gradient",
     "x2 ? scalings_of(level(end, b), sigma_data, boundary, 0) : by;", "by;", _of("consistency_loss uniform"), 2, 2),
    ("a target's output taken for its D", "denoised(x2[i], y[i], by2)", "y[i]", _of("consistency_loss uniform")),
    ("squares of float32", "(double)x[i] * x[i]", "0", _of("weighted_loss l2", "(2, 3, 7, 3)")),
    ("a quarter of them", "for (int j = 0; j < 4; j++)", "for (int j = 0; j < 1; j++)", _of("weighted_loss l2")),
    ("huber without minus c", "sqrt(sum + huber_c * huber_c) - huber_c", "sqrt(sum + huber_c * huber_c)",
     _of("weighted_loss huber")),
    ("gradient of huber: 0 / 0", "length == 0 ? 0 : scale / length", "scale / length",
     T_FORMULAS + "test_huber_without_c_has_gradient_zero_at_zero"),
    ("gradient of l2 without the factor 2", "(norm == L2 ? 2.0f : 1.0f)", "1.0f", _of("weighted_loss l2")),
    ("gradient of the target has the wrong sign", "opposite[i] = -to[i];", "opposite[i] = to[i];",
     _of("weighted_loss l2")),
    ("student's gradient by c_skip", "to[i] *= scale * by.out;", "to[i] *= scale * by.skip;",
     _of("consistency_loss l2")),
    ("signs of the whole difference", "(to[i] > 0) - (to[i] < 0)", "to[i]", _of("weighted_loss l1")),
    ("truncated snr: minimum for maximum", "snr < 1 ? 1 : snr", "snr > 1 ? 1 : snr",
     _of("consistency_loss truncated-snr")),
    ("karras without sigma_data", "return snr + one;", "return snr + 1;", _of("consistency_loss karras")),
    ("a sum beyond float32", "(float)sum == INFINITY ? INFINITY : sum", "sum",
     _STEPS + "sums_beyond_float32"),
    ("parts of one sample", "sum += sums[b * parts + part];", "sum += sums[part];", _of("weighted_loss l2")),
]

STEPS = [
    ("outputs in any order of memory", "(x.dtype == DTYPE and x.stride() == state.stride())", "x.dtype == DTYPE",
     _STEPS + "layouts_and_outputs_of_other_dtypes[output in channels_last-float32-float32-denoise]"),
    ("states in any order of memory", " and (x.is_contiguous() or native.channels_last(x))", "",
     _EVERY + "what_takes_a_form_for_the_cpu[denoise]"),
    ("levels one after the other", "sigma.stride(0) if sigma.ndim else 0", "1 if sigma.ndim else 0",
     _STEPS + "levels_lie_anywhere[denoise-strided]"),
    ("a scalar for one sample", "sigma.stride(0) if sigma.ndim else 0", "1",
     _STEPS + "levels_lie_anywhere[denoise-scalar]"),
    ("c_noise of a scalar is one", "told if told.ndim else told.expand(batch)", "told",
     _STEPS + "levels_lie_anywhere[scale_input-scalar]"),
    ("an input in the dtype of the state", "dtype=dtype or model_output.dtype", "dtype=dtype",
     _STEPS + "the_input_has_the_dtype_of_the_output"),
    ("laid out by strides", "torch.contiguous_format if state.is_contiguous() else native.CHANNELS_LAST[x.ndim]",
     "torch.contiguous_format", _STEPS + "strides_of_dimensions_of_one_element[none-states-denoise]"),
    ("truth of Python's alone", "bool(clip)", "clip", _STEPS + "numpys_truth"),
    ("noise of memory for a state in channels_last", "        if x.is_contiguous():\n", "        if True:\n",
     _STEPS + "layouts_and_outputs_of_other_dtypes[channels_last-float32-float32-renoise drawn]"),
    ("without a compiler", " and refusal() is None", "", _STEPS + "without_a_compiler"),
]

LOSSES = [
    ("operations wanted before these are there", "from cmfast.reference import WEIGHTINGS\n",
     "from cmfast.ops._autograd import fused\nfrom cmfast.reference import WEIGHTINGS\n",
     _NATIVE + "each_part_can_be_imported_first[losses]"),
    ("any gradient", " or not native.lies_here(grad, (torch.float64, *DTYPES)):", ":",
     _STEPS + "a_gradient_that_is_negated_where_it_is_read[weighted_loss l2]"),
    ("distances as hooks made them", "native.lies_here(distance, (DTYPE,))\n        and ", "",
     _STEPS + "distances_come_back_in_another_dtype[torch.float64]"),
    ("states as hooks made them", "        and all(native.lies_here(x, DTYPES) for x in kept)\n", "",
     _STEPS + "what_is_saved_comes_back_another[negated-weighted_loss l2]"),
    ("who looks on at gradients sees nothing", " or native.watched() or not native", " or not native",
     _STEPS + "gradients_before_who_looks_on[False-backward-weighted_loss l2]"),
    ("what hooks made of a state", "        and steps.fits(inputs[1])\n", "",
     _STEPS + "what_is_saved_comes_back_another[strides-weighted_loss l2]"),
    ("the weight twice", "return distance * weight, distance", "return distance * weight, distance * weight",
     _STEPS + "gradients_before_who_looks_on[False-forward-weighted_loss huber]"),
    ("no gradient of a weight", "(grad * distance).sum_to_size(weight.shape)", "(grad * 0).sum_to_size(weight.shape)",
     _of("weighted_loss l2")),
]

WHO_TAKES_IT = {
    "cmfast/ops/_autograd.py": [
        ("leaves inside of a transform", "own = differentiable or in_transform()", "own = differentiable",
         _NORM + "many_gradients_at_once"),
    ],
    "cmfast/ops/losses.py": [
        ("means of few numbers in C", "and x.numel() <= FEW:", "and False:",
         _STEPS + "means_of_few_numbers_are_pytorchs"),
    ],
    "cmfast/ops/_dispatch.py": [
        ("the batch of a trace", '== "auto" and not native.traced()', '== "auto"',
         _TRUNK + "a_trace_is_for_any_batch"),
    ],
    "cmfast/ops/_norm_cpu.py": [
        ("a checkpoint keeps less than it kept", "(records or not native.watched())", "not native.watched()",
         _NORM + "who_looks_on_sees_pytorchs[True-forward]"),
    ],
}

FAULTS = WHO_TAKES_IT | {
    "cmfast/native/noise.c": NOISE_C,
    "cmfast/native/scalings.h": SCALINGS_H,
    "cmfast/native/steps.c": STEPS_C,
    "cmfast/native/steps.py": STEPS,
    "cmfast/native/losses.c": LOSSES_C,
    "cmfast/native/losses.py": LOSSES,
    "cmfast/ops/noise.py": NOISE,
    "cmfast/ops/draw.py": LEVELS,
    "cmfast/native/noise.py": NOISE_LEVELS,
    "cmfast/native/__init__.py": COMPILING,
    "cmfast/native/winograd.py": WINOGRAD,
    "cmfast/native/winograd.c": WINOGRAD_C,
    "cmfast/native/common.h": COMMON,
    "cmfast/native/attention.py": ATTENTION,
    "cmfast/native/attention.c": ATTENTION_C,
    "cmfast/native/group_norm.py": GROUP_NORM,
    "cmfast/native/group_norm.c": GROUP_NORM_C,
}
