"""The names of tests that many faults turn red."""


def kernel(case: str, test: str = "agrees_with_float64", at: str = "(2, 3, 7, 3)-float32-bfloat16") -> str:
    """A test of every kernel, for one operation."""
    return f"tests/kernels/test_every_op.py::test_{test}[{at}-{case}]"


def one_level(case: str) -> str:
    return f"tests/kernels/test_every_op.py::test_one_level_for_all[{case}]"


def layout(case: str, layout: str, shape: str = "(2, 3, 8, 8)") -> str:
    return kernel(case, "layouts", f"{shape}-{layout}")


def here(case: str, shape: str = "(2, 3, 7, 3)") -> str:
    """A form for the CPU against float64, for one operation."""
    return f"tests/ops/test_every_op.py::test_what_auto_takes_here[{shape}-{case}]"


def norm(kind: str, way: str = "one launch", layout: str = "contiguous") -> str:
    """Group normalisation with what stands around it, through a slab or three launches."""
    return f"tests/kernels/test_group_norm.py::test_kinds[{way}-{kind}-{layout}]"


def loop(name: str, through: str = "network") -> str:
    return f"tests/test_golden.py::test_sampling_loops[{name}-{through}]"


def loss(name: str, indices: str = "given") -> str:
    return f"tests/test_golden.py::test_consistency_and_progressive_losses[indices {indices}-{name}]"


T_EXACT, T_NOISE = "tests/kernels/test_exact.py::", "tests/kernels/test_noise.py::"
T_BOUNDARY = T_EXACT + "test_identity_at_the_boundary_bit_for_bit[0.002-0.5-float32-bfloat16]"
T_PIXELS = T_EXACT + "test_pixels[(2, 3, 16, 16)-{}]"
T_FUZZ = "tests/fuzz/test_ops.py::test_any_call"
T_GRADIENT_LAYOUT = "tests/kernels/test_every_op.py::test_layout_of_incoming_gradients[{}]"
T_SAME_NOISE = T_NOISE + "test_every_operation_draws_the_same_noise[{}]"
T_WORDS = T_NOISE + "test_integers_are_those_of_the_reference[{}]"
T_FORMULAS, T_DISPATCH = "tests/ops/test_formulas.py::", "tests/ops/test_dispatch.py::"
T_NORM = "tests/kernels/test_group_norm.py::"
T_LAYOUT = "tests/test_samplers.py::test_noise_of_a_seed_does_not_depend_on_the_layout_of_the_model"
T_DROPS = T_NORM + "test_dropout_keeps_what_the_reference_keeps[one launch-{}-numbers-contiguous]"
T_SOUND = "tests/aot/test_programs.py::test_a_program_is_sound[{}-sm_90]"
T_NUMBERS = "tests/aot/test_inductor.py::test_numbers_as_inductor_passes_them[{}]"
