"""C for CPUs: its compilation, and Winograd's convolution."""

_FAST = "tests/fast/test_optimize.py::test_"
_MEMORY = "tests/fast/test_memory.py::test_"
_PACKING = "tests/fast/test_packing.py::test_"
_WINOGRAD = "tests/native/test_winograd.py::test_"
_NATIVE = "tests/native/test_native.py::test_"
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
    ("nobody looks on", "torch._C._len_torch_dispatch_stack() or ", "", _FAST + "no_idle_passes"),
    ("traces have it", " or torch._C._get_tracing_state()", "", _WINOGRAD + "a_trace_is_not_of_it"),
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
    ("what is kept is never old", "repr((source.read_bytes(), to_object", "repr((to_object", _NATIVE + "compiled_once"),
    ("what others put there is run", "or (others and not kept_apart)", "",
     _NATIVE + "nothing_is_kept_where_it_is_not_safe[others may write]"),
    ("what others put in a folder's place is run", "for each in (folder, *folder.parents):", "for each in (folder,):",
     _NATIVE + "nothing_is_kept_where_it_is_not_safe[others may put another there]"),
    ("an OpenMP of its own", '("-shared",)', '("-shared", "-fopenmp")', _NATIVE + "the_threads_are_those_of_pytorch"),
    ("any CPU", "if cpu not in FLAGS:", "if False:", _NATIVE + "other_machines[Linux-DEFAULT]"),
    ("the compiler's first words", 'if "error" in line', "if line", _NATIVE + "a_fault_in_the_source_is_named"),
]

FAULTS = {
    "cmfast/native/__init__.py": COMPILING,
    "cmfast/native/winograd.py": WINOGRAD,
    "cmfast/native/winograd.c": WINOGRAD_C,
}
