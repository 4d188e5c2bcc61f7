"""Networks made fast."""


_FAST = "tests/fast/test_optimize.py::test_"
_CHANGES = "tests/fast/test_changes.py::test_"
_MEMORY = "tests/fast/test_memory.py::test_"
_PACKING = "tests/fast/test_packing.py::test_"
_MASKS = "tests/fast/test_masks.py::test_"
_RESAMPLING = _CHANGES + "resampling_of_another_kind_is_called"
_FAST_OUTPUT = _FAST + "outputs[{}-8-torch.float32]"


FAST_PLAN = [
    (
        "1x1 taken for any",
        "!= expected or conv.bias is None",
        "!= expected and conv.bias is None",
        _FAST + "errors",
    ),
    (
        "a subclass passes",
        "if type(module) not in kinds:",
        "if not isinstance(module, kinds):",
        _CHANGES + "a_parametrised_weight_is_used",
    ),
    ("parts with a pass of their own", 'if "forward" in vars(module):', 'if "pass" in vars(module):', _FAST + "errors"),
    ("a patched class passes", "if _is_patch(function):", "if False:", _CHANGES + "a_patch_of_a_class_is_called"),
    ("what wraps an original is one", 'function = vars(function).get("__wrapped__")', "return False",
     _CHANGES + "what_torch_wraps_is_no_patch"),
    ("a processor is no part", 'for part in (module, vars(module).get("processor"))', "for part in (module,)",
     "tests/fast/test_diffusers.py::test_a_patch_of_a_class_is_called"),
    ("weights of any class", "        if not is_plain(parameter):", "        if False:",
     _CHANGES + "weights_with_rules_of_their_own"),
    ("down for up", 'return Resample("up", conv)', 'return Resample("down", conv)', _FAST_OUTPUT.format("resampling")),
    ("a skip is forgotten", "if type(skip) is nn.Identity else", "if True else", _FAST_OUTPUT.format("published")),
    (
        "scale and shift always",
        "scale_shift=module.use_scale_shift_norm",
        "scale_shift=True",
        _FAST_OUTPUT.format("added"),
    ),
    ("what occurs again is left out", "parts = list(exact(module, kind, where))",
     "parts = list(exact(module, kind, where).children())", _CHANGES + "a_part_that_occurs_twice_runs_twice"),
    ("x is resampled as h is", 'for name in ("h_upd", "x_upd"))', 'for name in ("h_upd", "h_upd"))', _RESAMPLING),
    ("resampling without its convolution", "if h != x or h.conv is not None:", "if h.kind != x.kind:", _RESAMPLING),
    ("averages of any size", "    if settings not in (", "    if False and settings not in (", _RESAMPLING),
    ("any scale is two", "if module.scale_factor != 2:", "if False:", _RESAMPLING),
]

FAST_FORWARD = [
    ("the small image where it is not doubled", '        if up:\n            h = _resampled(h, "up")\n', "",
     _FAST + "float64"),
    ("a half torso goes on to the end", "if self.weights.dtype is None and plan", "if False and plan",
     _CHANGES + "a_torso_in_half_precision[False-torch.float16]"),
    ("no skip", "skips.append(h)", "skips.append(skips[0])", _FAST_OUTPUT.format("published")),
    ("skips in order", "skips.pop())), emb", "skips.pop(0))), emb", _FAST_OUTPUT.format("published")),
    ("halves the wrong way", "scale, shift = emb.chunk", "shift, scale = emb.chunk", _FAST_OUTPUT.format("published")),
    ("embedding without SiLU", "F.linear(F.silu(emb)", "F.linear((emb)", _FAST_OUTPUT.format("published")),
    (
        "attention without x",
        "residual = x.settle()\n        # Views",
        "residual = h\n        # Views",
        _FAST_OUTPUT.format("published"),
    ),
    ("SiLU before attention", "block.norm, silu=False)", "block.norm, silu=True)", _FAST_OUTPUT.format("published")),
    ("heads mixed", "permute(2, 0, 3, 1, 4)", "permute(2, 0, 3, 1, 4).flip(0)", _FAST_OUTPUT.format("heads")),
    (
        "another epsilon",
        '"eps": norm.eps',
        '"eps": 10 * norm.eps',
        "tests/fast/test_diffusers.py::test_outputs[other groups-torch.float32]",
    ),
    ("dropout in evaluation", "return dropout.training and 0 < dropout.p < 1",
     "return 0 < dropout.p < 1", _CHANGES + "dropout"),
    (
        "one mask for all",
        "self._draw._replace(draw=self._draw.draw + 1)",
        "self._draw._replace(draw=0)",
        _MASKS + "masks_differ_from_layer_to_layer",
    ),
    ("numbers of places", "if draw.draw >= DROPOUT_DRAW else None", "if False else None",
     _MASKS + "a_block_that_occurs_twice_has_one_number[False]"),
    ("dropout of 1 drops nothing", "dropout.training and dropout.p == 1:", "False:", _MASKS + "everything_is_dropped"),
    ("another mask when recomputing", "            self._draw = draw\n", "            pass\n", _CHANGES + "dropout"),
    (
        "bias twice",
        "return Sum(self.convolve(h, conv, bias=False, up=up), residual",
        "return Sum(self.convolve(h, conv, up=up), residual",
        "tests/kernels/test_optimize.py::test_outputs_and_gradients[published]",
    ),
    (
        "one bias of two",
        "(block.skip.bias, block.out_conv.bias)",
        "(block.skip.bias,)",
        "tests/kernels/test_optimize.py::test_outputs_and_gradients[published]",
    ),
    (
        "the sum is forgotten",
        "            x.settle(total)\n",
        "            pass\n",
        "tests/kernels/test_optimize.py::test_launches_of_the_published_network",
    ),
    (
        "the result in another dtype",
        "plan.out_conv).to(x.dtype)",
        "plan.out_conv)",
        _FAST + "outputs[published-8-torch.bfloat16]",
    ),
]

FAST_WEIGHTS = [
    ("doubled filters in the dtype of weights", "functools.partial(doubling.fold, dtype=self.dtype)", "doubling.fold",
     "tests/fast/test_optimize.py::test_gradients[resampling-torch.bfloat16]"),
    (
        "a weight that could not be made counts as made",
        "        seen, made, old = self._look(), self._made(), self.value\n",
        "        self._seen = seen = self._look()\n        made, old = self._made(), self.value\n",
        "tests/test_engine_failures.py::test_weights_that_cannot_be_made[eager]",
    ),
    (
        "a weight half made counts as made",
        "        seen, made, old = self._look(), self._made(), self.value\n",
        "        self._seen = seen = self._look()\n        made, old = self._made(), self.value\n",
        "tests/test_engine_stress.py::test_a_weight_made_again_in_two_threads",
    ),
    ("a weight that a graph reads is given up", "kept = self._kept.setdefault(key, _Kept(parameters, make))",
     "kept = self._kept[key] = _Kept(parameters, make)",
     "tests/fast/test_memory.py::test_two_threads_that_make_a_weight_at_once_have_one"),
    (
        "addresses come back",
        " or any(storage.expired() for storage in storages)",
        "",
        "tests/test_engine_stress.py::test_memory_that_comes_back[torch.bfloat16-False]",
    ),
    (
        "old weights",
        "        if self.outdated:\n            self.make_again()",
        "",
        _CHANGES + "changes_are_seen[model-None-changed_in_place]",
    ),
    (
        "versions are not looked at",
        "0 if p.is_inference() else p._version",
        "0",
        _CHANGES + "changes_are_seen[model-torch.bfloat16-changed_in_place]",
    ),
    ("packed again at every other batch size", "packs[shape] = kept", "packs = {shape: kept}",
     _PACKING + "another_batch_size"),
    ("a copy for each batch size", "if _layout(other.value) == layout", "if False", _PACKING + "another_batch_size"),
    ("the layout of another shape", "if _layout(other.value) == layout", "if True",
     _PACKING + "layouts_that_differ_are_kept_apart"),
    ("all layouts kept", "if kept not in layouts and len(layouts) >= LAYOUTS:", "if False:",
     _PACKING + "layouts_that_differ_are_kept_apart"),
    ("all shapes kept", "if len(packs) >= SHAPES:", "if False:", _PACKING + "few_shapes_are_known"),
    ("inference mode counts nothing", "            or any(map(Tensor.is_inference, self.parameters))\n", "",
     _CHANGES + "weights_of_inference_mode"),
    ("nobody waits", "        self.wait()\n        return self.value", "        return self.value",
     _MEMORY + "streams_wait_for_what_another_made"),
    ("memory that another stream still reads",
     "            value.record_stream(torch.cuda.current_stream(value.device))\n", "",
     _MEMORY + "memory_is_kept_for_all_streams_that_read_it"),
    ("memory is kept once for all", "self.value, self._streams = made, _streams(made)", "self.value = made",
     _MEMORY + "memory_is_kept_for_all_streams_that_read_it"),
    ("a capture waits", " or torch.cuda.is_current_stream_capturing():\n            return\n        if here", ":\n"
     "            return\n        if here",
     _MEMORY + "streams_wait_for_what_another_made"),
    ("what is kept keeps its keeper", "self._cast = functools.partial(_cast, dtype)",
     "self._cast = lambda p: _cast(self.dtype, p)", _MEMORY + "memory_is_given_back_at_once"),
    ("new memory", "replaced = not fits or made.is_mkldnn", "replaced = True", _CHANGES + "refresh"),
    ("force is nothing", "if force or kept.outdated", "if kept.outdated", _CHANGES + "refresh"),
    (
        "tensors of inference mode",
        "torch.inference_mode(False), torch.no_grad()",
        "torch.no_grad()",
        _CHANGES + "inference_mode",
    ),
    (
        "a copy for nothing",
        "and parameter.is_contiguous(memory_format=torch.channels_last):",
        "and False:",
        _PACKING + "weights_of_the_right_kind_are_not_copied",
    ),
]

_DOUBLING = "tests/fast/test_doubling.py::test_"

FAST_DOUBLING = [
    ("a tap too few", "(0.0, 1.0, 1.0)", "(0.0, 1.0, 0.0)", _DOUBLING + "values[32-96-(3, 5, 7)-torch.float32]"),
    ("mirrored", "(0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0)",
     "(1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (0.0, 0.0, 1.0)",
     _DOUBLING + "values[32-96-(3, 5, 7)-torch.float32]"),
    ("rows for columns", '"ai,bj->abij"', '"ai,bj->abji"', _DOUBLING + "values[32-96-(3, 5, 7)-torch.float32]"),
    ("rounded, then added", "taps = weight.permute", "taps = weight.to(dtype).permute",
     _DOUBLING + "weights_are_added_before_they_are_rounded"),
    ("any stride", "(conv.stride, conv.padding) == ((1, 1), (1, 1))", "conv.padding == (1, 1)",
     _DOUBLING + "what_it_does_not_do[stride]"),
    ("any padding", "(conv.stride, conv.padding) == ((1, 1), (1, 1))", "conv.stride == (1, 1)",
     _DOUBLING + "what_it_does_not_do[padding]"),
    ("a filter for few pixels", "(kept or h.numel() // h.shape[1] >= LEAST_PIXELS)", "True",
     _DOUBLING + "filters_for_one_pass_are_for_many_pixels"),
    ("kept filters for many pixels alone", "(kept or h.numel()", "(h.numel()", _DOUBLING + "networks_use_it[True]"),
]

FAST_NETWORK = [
    ("a patch comes too late", "vars(kind).get(name) is not method for", "False for",
     _CHANGES + "a_patch_of_a_class_is_called[UNetModel-forward-replaced]"),
    (
        "compiling asks once",
        "return _dispatch.transform_refusal() is None and _passes[number].refusal is None",
        "return _passes[number]._plan is not None or _passes[number].refusal is None",
        _FAST + "compiling_sees_what_changed_before",
    ),
    ("transforms take the fast pass", "_dispatch.transform_refusal() is None and", "",
     _CHANGES + "transforms_take_the_ordinary_pass[jvp]"),
    ("what is compiled stays", "self._make_plan(self._model) if torch.compiler.is_compiling() else self._plan",
     "self._plan", _FAST + "another_part_is_compiled_anew"),
    ("users hear of a fast class", "    def __init_subclass__(cls, **_: Any)", "    def _unheard(cls, **_: Any)",
     _FAST + "a_subclass_keeps_what_it_brings"),
    ("fake tensors take the fast pass", "if not is_plain(x) or x.is_meta", "if x.is_meta",
     _CHANGES + "fake_tensors_leave_nothing_behind"),
    ("a subclass is none", "    if base is UNetModel:\n", "    if True:\n",
     _FAST + "a_subclass_keeps_what_it_brings"),
    ("a subclass that pickle cannot find", "return without_parts, (_fast_class, base), self.__dict__",
     "return object.__new__, (type(self),), self.__dict__", _FAST + "a_subclass_keeps_what_it_brings"),
    ("a copy runs the original's parts", "if self._model._modules is not model._modules:", "if False:",
     _CHANGES + "a_copy_with_other_parts_runs_them"),
    ("the meta device takes the fast pass", "or x.is_meta or", "or", _CHANGES + "the_meta_device"),
    ("refresh makes no plan", "return self._look(force) or", "return self._look() or",
     _CHANGES + "settings_of_torchs_modules"),
    ("the two know each other", "self._pack = _twin(model), make_plan", "self._pack = model, make_plan",
     _MEMORY + "memory_is_given_back_at_once"),
    ("changes of structure", "is Change.STRUCTURE or", "is None or", _CHANGES + "a_lora_is_called"),
    (
        "a plan half made",
        "        with _looking:\n            if self._watch is None:",
        "        if True:\n            if self._watch is None:",
        "tests/test_engine_stress.py::test_a_first_look_in_two_threads",
    ),
    (
        "a plan that could not be made counts as made",
        "            served = self._plan is not None\n",
        "            served = self._plan is not None\n            self._stale = False\n",
        "tests/test_engine_failures.py::test_a_plan_that_cannot_be_made",
    ),
    ("hooks are skipped", "self._reason or self._watch.hooked(root=False)", "self._reason",
     _CHANGES + "a_hook_is_called"),
    ("its own hooks count", "hooked(root=False)  # type", "hooked()  # type", _CHANGES + "a_hook_is_called"),
    (
        "packed where gradients flow",
        "packed = onednn and self._pack and not differentiable",
        "packed = onednn and self._pack and not live",
        _FAST + "gradient_of_the_input_alone[published]",
    ),
    (
        "autocast is ignored",
        "if self.dtype is None and torch.is_autocast_enabled",
        "if False and torch.is_autocast_enabled",
        _FAST + "autocast_is_the_dtype[published]",
    ),
    ("float64 packed", "return there and dtype == torch.float32", "return there", _FAST + "float64"),
    (
        "bfloat16 is not packed",
        "return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())",
        "return False",
        _PACKING + "weights_are_packed_in_bfloat16[True]",
    ),
    ("bfloat16 is not compiled", "on_cpu and dtype == winograd.DTYPE and any", "on_cpu and any",
     _PACKING + "weights_are_packed_in_bfloat16[False]"),
]

FAST_DIFFUSERS = [
    ("classes that Dynamo does not follow", "not module.__module__.startswith", "not kind.__module__.startswith",
     "tests/fast/test_diffusers.py::test_another_part_is_compiled_anew"),
    ("averages that are none", '        average_pool(module.conv, f"{where}.conv")\n', "",
     "tests/fast/test_diffusers.py::test_parts_that_are_refused"),
    (
        "a class that pickle cannot find",
        "return without_parts, (_fast_class, base), self.__dict__",
        "return object.__new__, (type(self),), self.__dict__",
        "tests/test_engine_copies.py::test_optimised_networks[UNet2DModel-None-pickle]",
    ),
]

FAULTS = {
    "cmfast/fast/plan.py": FAST_PLAN,
    "cmfast/fast/forward.py": FAST_FORWARD,
    "cmfast/fast/weights.py": FAST_WEIGHTS,
    "cmfast/fast/doubling.py": FAST_DOUBLING,
    "cmfast/fast/__init__.py": [
        ("attributes of another", "parts = model._modules if own else {}",
         'parts = {n: getattr(model, n, None) for n in ("network", "unet")}',
         _CHANGES + "what_torch_compile_made_is_left_alone"),
        ("compiled in place", "if model._compiled_call_impl is not None:", "if False:",
         _CHANGES + "what_torch_compile_made_is_left_alone"),
    ],
    "cmfast/fast/network.py": FAST_NETWORK,
    "cmfast/fast/diffusers.py": FAST_DIFFUSERS,
}
