"""Runs that are stopped or met by another, and files that are broken or made to do harm."""

_STOP = "tests/training/test_stop.py::test_"
_LOCK = "tests/training/test_lock.py::test_"
_FAULTS = "tests/training/test_faults.py::test_"
_KILLS = "tests/training/test_kills.py::test_"


def refused(kind: str) -> str:
    return f"tests/test_hostile_files.py::test_refused_and_not_run[{kind}]"


def bomb(kind: str) -> str:
    return f"tests/test_hostile_files.py::test_bombs_take_no_memory[{kind}]"


FAULTS = {
    "cmfast/training/stop.py": [
        ("SIGTERM kills", "                signal.signal(signal.SIGTERM, self._handle)", "                pass",
         _STOP + "the_command_line[stop-0]"),
        ("the handler stays", "            signal.signal(signal.SIGTERM, self._before)", "            pass",
         _STOP + "the_step_at_hand_is_the_last"),
        ("the handler that was there is forgotten", "            self._before(number, frame)", "            pass",
         _STOP + "a_handler_that_was_there_is_called_too"),
        ("each process by itself", "        if self._group.size == 1:", "        if True:",
         _STOP + "one_of_two_processes_is_told"),
        ("a status that is no success", "super().__init__(0)", "super().__init__(1)",
         _STOP + "the_step_at_hand_is_the_last"),
    ],
    "cmfast/cli.py": [
        ("a consistency model as the digits' teacher", "checkpoint.load_teacher(", "checkpoint.load(",
         "tests/test_cli.py::test_a_consistency_model_is_no_teacher_of_digits"),
        ("no output at all", "        if stream is None:", "        if False:",
         "tests/test_cli.py::test_output_that_is_closed[>&-]"),
        ("letters that the output lacks end it", '            stream.reconfigure(errors="backslashreplace")',
         "            pass", "tests/test_cli.py::test_letters_that_the_output_lacks"),
        ("a closed pipe is an error", "isinstance(error, BrokenPipeError) and _unread()", "False",
         "tests/test_cli.py::test_a_reader_that_has_seen_enough"),
        ("any broken pipe is a success", "isinstance(error, BrokenPipeError) and _unread()",
         "isinstance(error, BrokenPipeError)", "tests/test_cli.py::test_another_pipe_that_breaks_is_an_error"),
    ],
    "cmfast/cli_common.py": [
        ("~ is a name", "return os.path.expanduser(text)", "return text",
         "tests/test_cli.py::test_home_folders_and_links"),
        ("every comma parts two rates", 'if found and "=" in part:', "if False:",
         "tests/training/test_recipes.py::test_rates_with_arguments"),
        ("memory that runs out is a fault", "    if not out_of_memory(error):", "    if True:",
         "tests/test_cli.py::test_memory_that_runs_out[demo-MemoryError]"),
        ("every fault is the user's", "    if not out_of_memory(error):", "    if False:",
         "tests/test_cli.py::test_faults_of_its_own_have_a_traceback"),
    ],
    "cmfast/cli_train.py": [
        ("digits whatever was given", 'digits = arguments.recipe == "mnist"', "digits = arguments.recipe is None",
         "tests/test_cli.py::test_what_is_trained_is_said[arguments0---recipe is missing]"),
        ("a network beside a file's other weights", 'if "network" in dict(changes):', "if False:",
         "tests/training/test_recipes.py::test_a_network_beside_other_weights[init]"),
        ("what torchrun starts again is refused", '(again and "auto")', "False",
         "tests/training/test_recipes.py::test_what_torchrun_starts_again_goes_on"),
        ("what is begun goes on with another run", '(again and "auto")', '"auto"',
         "tests/training/test_recipes.py::test_what_torchrun_starts_again_goes_on"),
        ("torchrun ends it before it says why", "        until_said.enter_context(Stop(group))\n", "",
         _FAULTS + "a_process_that_dies_ends_the_others[0]"),
    ],
    "cmfast/perceptual.py": [
        ("a damaged file is a download that failed", "    if cached.is_file():", "    if False:",
         "tests/test_perceptual_weights.py::test_damaged_weights_are_named_and_what_to_do[cached-0.5]"),
    ],
    "cmfast/training/lock.py": [
        ("a lock that is shared", "fcntl.LOCK_EX |", "fcntl.LOCK_SH |", _LOCK + "the_second_is_refused"),
        ("children keep it", "    os.register_at_fork(after_in_child=_let_go)", "    pass",
         _LOCK + "children_do_not_keep_it"),
        ("a link is followed", 'getattr(os, "O_NOFOLLOW", 0)', "0", _LOCK + "the_file_is_no_link"),
    ],
    "cmfast/ranks.py": [
        ("a connection that is lost is any error", "or not _LOST.search(str(error))", "or True",
         _FAULTS + "a_process_that_dies_ends_the_others[0]"),
    ],
    "cmfast/images.py": [
        ("a label of many numbers", "arrays[-1].shape != arrays[0].shape[:1]", "len(arrays[-1]) != len(arrays[0])",
         "tests/test_images.py::test_labels_of_other_images"),
        ("pictures over each other", '_check.whole("gap", gap, least=0)', "gap",
         "tests/test_images.py::test_a_gap_that_is_none"),
        ("any numbers are pixels", 'dtype != "uint8" or len(shape) != 4', "len(shape) != 4",
         "tests/test_images.py::test_what_are_no_pixels"),
        ("a link is looked at alone", "Path(os.path.realpath(path))  # of a link", "path  # of a link",
         "tests/test_images.py::test_output_through_a_link"),
        ("written in place", 'with written_whole(path) as unfinished, open(unfinished, "wb")',
         'with open(path, "wb")', _KILLS + "killed_while_writing_pictures[5-x.npz]"),
    ],
    "cmfast/quality.py": [
        ("a model of anything", "if each is not None and (each.image_shape", "if False and (each.image_shape",
         "tests/test_quality.py::test_models_of_something_else_are_refused_at_once"),
    ],
    "cmfast/recipes.py": [
        ("a network that nobody makes", 'for name in ("init", "teacher"):', 'for name in ("init",):',
         "tests/test_cli.py::test_what_is_trained_is_said[arguments10-new weights, and paths.teacher names others]"),
        ("a teacher that nobody asks", 'if paths["teacher"] is not None and not aim.needs_teacher:', "if False:",
         "tests/test_cli.py::test_what_is_trained_is_said[arguments8-ect takes no teacher; did you mean --init?]"),
    ],
    "cmfast/denoiser.py": [
        ("any rho", "0 < rho <= RHO_MAX and", "True and", "tests/test_checkpoint_errors.py::test_wrong_arguments"),
    ],
    "cmfast/whole.py": [
        ("a full disk without a name", "if error.errno is None or error.filename is not None:", "if True:",
         "tests/test_images.py::test_a_full_disk_says_what_was_written"),
        ("a link is replaced by a file", "Path(os.path.realpath(path))", "Path(path)",
         "tests/test_checkpoint.py::test_save_replaces_what_a_link_points_to"),
        ("nothing is flushed", "            os.fsync(file.fileno())", "            pass",
         "tests/test_checkpoint.py::test_flushed_before_it_is_renamed"),
        ("half a file stays", "        unfinished.unlink(missing_ok=True)", "        pass",
         "tests/test_checkpoint.py::test_crash_leaves_the_old_file_and_nothing_else[new-write]"),
    ],
    "cmfast/data/npz.py": [
        ("any size of what is compressed", "size > max(FREE, RATIO * compressed)", "False",
         bomb("npz: bomb of images")),
        # np.load(allow_pickle=False) behind it would refuse them too, in other words.
        ("objects are left to numpy", "    if dtype.hasobject:", "    if False:", refused("npz: hostile pickle")),
        ("any header", "    if length > HEADER:", "    if False:", bomb("npz: bomb for a header")),
        ("the header alone is believed", "size != there:", "False:", refused("npz: a header that claims less")),
    ],
    "cmfast/data/decode.py": [
        ("torchvision before the header", "    _size(io.BytesIO(content.data))\n", "",
         "tests/test_data_folder_broken.py::test_a_bomb_that_comes_later[torchvision]"),
        ("a pipe is waited for", "    if not path.is_file():", "    if not path.exists():", refused("images: a pipe")),
    ],
    "cmfast/data/arrays.py": [
        ("a pipe is waited for", "    if not path.is_file():", "    if not path.exists():", refused("npz: a pipe")),
    ],
    "cmfast/untrusted.py": [
        ("archives may be compressed", "info.compress_type != zipfile.ZIP_STORED or", "", refused("pt: compressed")),
        ("more than the file", "    if total > size:", "    if False:", refused("pt: one number as a matrix")),
        ("any dtype", "if tensor.dtype not in DTYPES:", "if False:", refused("pt: integer weights")),
        ("any number of blocks", "    if blocks > tensors:", "    if False:",
         bomb("safetensors: blocks without number")),
    ],
    "cmfast/checkpoint.py": [
        ("pickles run", '"weights_only": True', '"weights_only": False', refused("pt: hostile pickle")),
        ("weights stay part of their file", "{name: tensor.clone() for", "{name: tensor for",
         "tests/test_checkpoint.py::test_the_file_may_be_written_again[.pt]"),
        ("NaN is a weight", "not all(value.isfinite() for value in tensor.aminmax())", "False",
         "tests/test_checkpoint_errors.py::test_weights_that_are_no_numbers"),
        ("every image is square", "if image_shape is None and isinstance", "if isinstance",
         "tests/test_checkpoint.py::test_images_that_are_not_square"),
        ("an image's shape beside another size", 'settings.pop("image_shape", None)', "pass",
         "tests/test_checkpoint.py::test_images_that_are_not_square"),
    ],
    "cmfast/training/config.py": [
        ("aliases are believed", "        if _values(node) > LARGEST:", "        if False:",
         bomb("yaml: a million merges")),
        ("objects are made", "yaml.SafeLoader(", "yaml.UnsafeLoader(", refused("yaml: a command")),
    ],
    "cmfast/compat/diffusers/network.py": [
        ("any configuration", "    if least > max(size, 2**24):", "    if False:", bomb("diffusers: huge widths")),
    ],
}  # fmt: skip
