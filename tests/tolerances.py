"""The only tolerance table. Errors are max |value - expected| / max |expected| unless a test says otherwise."""

import torch

#: Against golden numbers of the original code, computed there in float32 on a CPU.
GOLDEN_VALUE = 2e-5
#: Gradients, and whole sampling loops, where float32 rounding adds up over the steps.
GOLDEN_LOOP = 2e-4

#: Floors of `error(fast) <= 2 error(eager, same dtype) + floor`, by dtype: a few units in the last place.
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
