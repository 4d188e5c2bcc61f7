"""Data to train on."""

MEMORY = "tests/test_data.py::test_"
FOLDER = "tests/test_data_folder.py::test_"
FAULT = "tests/training/test_faults.py::test_a_"

STREAM = [
    ("one order for every epoch", "torch.tensor([epoch]", "torch.tensor([0]", MEMORY + "order[7-3]"),
    ("one order for every seed", "uniform_int(seed, torch.tensor", "uniform_int(0, torch.tensor",
     MEMORY + "order_follows_from_the_whole_seed_and_the_epoch"),
    ("an epoch ends early", "order[offset : offset + start + batch_size - position]",
     "order[offset : offset + batch_size]", MEMORY + "order[7-3]"),
    ("a permutation for every batch", "if position // size != epoch:", "if True:",
     MEMORY + "one_permutation_an_epoch"),
    ("all ranks see the same", "(start_step * world_size + rank) * batch_size", "start_step * world_size * batch_size",
     MEMORY + "ranks_see_together_what_one_does"),
    ("a resume counts one rank's images", "(start_step * world_size + rank)", "(start_step + rank)",
     MEMORY + "a_later_start"),
    ("flips by the place in a batch", "ops.uniform_int(seed, index, 2", "ops.uniform_int(seed, index - start, 2",
     MEMORY + "flips_follow_from_the_position"),
    ("upside down", "images.flip(-1)", "images.flip(-2)", MEMORY + "flips_follow_from_the_position"),
    ("pixels are changed in place", "images.to(torch.float32).div_(127.5)", "images.float().div_(128)",
     MEMORY + "to_unit"),
]  # fmt: skip

ARRAYS = [
    ("NaN is in [-1, 1]", "if not (low >= -1 and high <= 1):", "if low < -1 or high > 1:", MEMORY + "bad_images[3]"),
    ("labels are no part of a fingerprint", "            digest.update(self.labels.contiguous().numpy().tobytes())\n",
     "            pass\n", MEMORY + "fingerprints_tell_data_apart"),
    ("floats are read at once", "array.astype(np.float32, copy=not array.flags.aligned)", "array.astype(np.float32)",
     MEMORY + "floats_of_an_uncompressed_npz[images-True]"),
    ("floats at any address", "array.astype(np.float32, copy=not array.flags.aligned)",
     "array.astype(np.float32, copy=False)", MEMORY + "floats_of_an_uncompressed_npz[arr_0-False]"),
    ("a map that writes to the file", 'mode="c"', 'mode="r+"', MEMORY + "an_uncompressed_npz_is_not_read_at_once[C]"),
    ("a map by the length of the name alone", "name_length + extra_length + header", "name_length + header",
     MEMORY + "an_uncompressed_npz_is_not_read_at_once[C]"),
    ("columns first", 'order="F" if columns_first else "C"', 'order="C"',
     MEMORY + "an_uncompressed_npz_is_not_read_at_once[F]"),
    ("channels last", ".permute(0, 3, 1, 2)", ".permute(0, 3, 2, 1)", MEMORY + "npz[arr_0-savez]"),
]  # fmt: skip

PIXELS = [
    ("the corner for the centre", "top, left = (height - size) // 2, (width - size) // 2", "top, left = 0, 0",
     FOLDER + "sizes_and_channels"),
    ("no antialiasing", "antialias=True", "antialias=False", MEMORY + "fit_is_torchvisions[torch.uint8-(3, 12, 12)-5]"),
    ("floats ring", "flat.clamp(-1, 1)", "flat.clamp(-2, 2)",
     MEMORY + "fit_is_torchvisions[torch.float32-(1, 8, 6)-9]"),
    ("channels that are left as they are", "if channels is not None and images.shape[-3] not in (1, 3):", "if False:",
     MEMORY + "channels_of_what_is_neither_grey_nor_rgb[3]"),
    ("grey is cut, not rounded", " + 2**15) >> 16", ") >> 16", MEMORY + "fit_colours"),
]  # fmt: skip

DECODE = [
    ("16 bits are cut off at 255", '    if image.mode.startswith("I"):', '    if image.mode == "F":',
     FOLDER + "both_decoders_read_the_same[16 bits]"),
    ("a GIF is torchvision's", 'PILLOWS = (b"BM", b"GIF", ', 'PILLOWS = (b"BM", ',
     FOLDER + "both_decoders_read_the_same[GIF]"),
    ("a PNG is torchvision's", ', b"\\x89PN"', "",
     FOLDER + "a_png_is_pillows"),
    ("a WebP is torchvision's", ', b"RIF")', ")", FOLDER + "both_decoders_read_the_same[WebP of two frames]"),
    ("torchvision where it is not", 'if by == "Pillow" or content', "if content",
     FOLDER + "who_decodes"),
]  # fmt: skip

READER = [
    ("names in the order of the disk", "    return sorted(names)", "    return sorted(names, reverse=True)",
     FOLDER + "what_a_folder_holds"),
    ("hidden folders", 'if not name.startswith(".")]', "]", FOLDER + "what_a_folder_holds"),
    ("the label of the file that is skipped", "self.labels[rows]", "self.labels[torch.from_numpy(draw.rows)]",
     FOLDER + "the_label_of_a_replacement"),
    ("a skipped file moves the others", "                    return image, at\n",
     "                    return image, row\n", FOLDER + "the_label_of_a_replacement"),
    ("skipped without being asked", "            if not self.skip_unreadable:\n", "            if False:\n",
     FOLDER + "a_truncated_image_ends_the_run_by_name[0]"),
    ("a warning for every epoch", "if not known and not self._warned:", "if True:",
     FOLDER + "skipped_images_are_replaced_in_place[0]"),
    ("a seed drawn from the generator of training", "            generator=torch.Generator(),\n", "",
     FOLDER + "workers_ranks_and_resumes_change_nothing"),
    ("flips are left to nobody", "Batch(mirrored(torch.stack(images), flips),", "Batch(torch.stack(images),",
     FOLDER + "workers_ranks_and_resumes_change_nothing"),
    ("a worker's error with its traceback", "                    unreadable[name] = decode.reason(error)\n",
     "                    raise\n", FOLDER + "a_truncated_image_ends_the_run_by_name[1]"),
    ("prefixes without being asked", "    elif labelled and not folders and", "    elif not folders and",
     FOLDER + "labels"),
    ("one subfolder is a class", "(labelled or len(set(folders)) > 1)", "True", FOLDER + "labels"),
    ("sizes of files are no part of a fingerprint", "{name}\\0{size}\\0", "{name}\\0",
     FOLDER + "a_fingerprint_tells_folders_apart"),
    ("folders again and again", "            _check_link(path, Path(folder, name))", "            pass",
     "tests/test_hostile_files.py::test_refused_and_not_run[images: a link to the folder around it]"),
    ("a worker ends when all are told to", "            worker_init_fn=_pass_over_one_sigterm,\n", "",
     FOLDER + "workers_that_are_spawned"),
    ("a worker that is killed leaves the others", "            end()\n", "            pass\n",
     FOLDER + "a_worker_that_is_killed_ends_the_run[reading]"),
    ("workers are left to multiprocessing at exit", "        atexit.register(end)\n", "",
     FOLDER + "a_worker_that_is_killed_ends_the_run[elsewhere]"),
    ("a folder is passed over", "onerror=unreadable.append, ", "", FOLDER + "a_folder_that_cannot_be_read"),
    ("a file of another size is what it was", "if files[name] != found.get(name)}", "if name not in found}",
     FOLDER + "a_file_that_a_run_lost[60-0]"),
    ("what a run lost is read all the same", "            if self.left_out[at]:\n", "            if False:\n",
     FOLDER + "another_image_in_the_place_of_one"),
    ("new images take the places of others", "found.keys() <= files.keys() and ", "",
     FOLDER + "other_images_than_a_run_has"),
    ("a few images are the run's", " and 2 * kept >= len(files)", "", FOLDER + "other_images_than_a_run_has"),
    ("a disk that is gone is looked for again and again", "tried % _LOOK == 0 and self._is_gone()", "False",
     FOLDER + "a_disk_that_goes_away[0-nothing]"),
    ("an empty folder is there", "return next(entries, None) is None", "return False",
     FOLDER + "a_disk_that_goes_away[0-an empty folder]"),
    ("all of a million are tried", "tried == _MOST or ", "", FOLDER + "too_many_in_a_row"),
    ("sizes by their type in a fingerprint", "int(channels or 3), int(image_size or height), int(image_size or width)",
     "(channels or 3, image_size or height, image_size or width)", FOLDER + "numbers_of_numpy"),
    ("images of several sizes", "elif one_size and this != size:", "elif False:", FOLDER + "sizes_and_channels"),
]  # fmt: skip

FAULTS = {
    "cmfast/data/stream.py": STREAM,
    "cmfast/data/arrays.py": ARRAYS,
    "cmfast/data/pixels.py": PIXELS,
    "cmfast/data/decode.py": DECODE,
    "cmfast/data/folder.py": READER,
    "cmfast/training/loop.py": [
        ("a run does not know its images again", "        if self.data.listing is not None:\n", "        if False:\n",
         FAULT + "run_whose_picture_vanished_ends_in_the_same_bits"),
    ],
    "cmfast/recipes.py": [
        ("a folder is as it is", "**opening, run=run)", "**opening)", FAULT + "picture_that_vanishes[0]"),
        ("settings of a run are somebody's", 'run is None and "data_fingerprint" not in given', "True",
         "tests/training/test_recipes.py::test_a_network_beside_other_weights[teacher]"),
    ],
}
