"""The only tolerance table. Errors are max |value - expected| / max |expected| unless a test says otherwise."""

import torch

#: Against golden numbers of the original code, computed there in float32 on a CPU.
GOLDEN_VALUE = 2e-5
#: Gradients, and whole sampling loops, where float32 rounding adds up over the steps.
GOLDEN_LOOP = 2e-4
#: The output of the full-size ImageNet-64 network, which magnifies rounding: its golden numbers lie 2.4e-4 from a
#: float64 run, and the original code itself misses them by 2.8e-5 with one thread instead of two, by 1.5e-4 without
#: oneDNN. Ours measures 2.2e-5 to 4.8e-5; with attention in the original's order of operations, 0.
GOLDEN_FULL_SIZE = 2e-4

#: Floors of `error(fast) <= 2 error(eager, same dtype) + floor`, by dtype: a few units in the last place.
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

#: PyTorch's own bilinear resize in float32, which computes positions in float32, and so the weights of pixels with the
#: rounding of numbers as large as the image is wide: measured 4.5e-6 from 64 to 224 pixels.
RESIZED = 1e-5

#: The same floors for kernels, as a part of the largest value. Half precision: half a unit in the last place, and what
#: float32 adds. float32: four units, since coefficients are computed in another order.
#: Of a sum whose terms cancel (the gradient of a bias before a normalisation), as a part of the sum of their sizes.
KERNEL_FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2**-8 + 5e-7, torch.float16: 2**-11 + 5e-7}

#: Against diffusers in float32, networks and loops of up to 40 steps: the same formulas in another order, and timesteps
#: that are float64 there. Ours measures up to 3.7e-6.
DIFFUSERS_VALUE = 1e-5

#: One float32 pass of a small network with the golden formula's weights against another: each lies up to 4.5e-6 from
#: a float64 run, in either layout; gradients of x differ by up to 1.0e-5.
FAST_VALUE = 3e-5

#: GOLDEN_FULL_SIZE for the optimised network, which adds in another order: it measures 2.4e-4, and 1.6e-4 from float64,
#: where the original code's golden numbers lie 2.4e-4 from that.
GOLDEN_FULL_SIZE_FAST = 5e-4

#: A whole network of the benchmarks in plain PyTorch against float64, with weights that keep activations around 1:
#: rounding passes through some sixty layers. float32, which rounds timesteps of 1095 as well, measures 2.6e-6
#: (ImageNet-64) to 4.0e-6 (tiny), bfloat16 1.1e-2 to 1.5e-2, float16 1.5e-3 to 1.9e-3.
NETWORK = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}

#: Changes of parameters, target and averages over a few training steps of the original's loops, as a part of the
#: largest: what float16 rounds differently, RAdam magnifies.
GOLDEN_TRAINED = {torch.float32: 1e-3, torch.float16: 2e-2}

#: Weights of two runs of a few float32 steps that should be one, as a part of how far the run came: their gradients
#: differ by rounding, and the first steps of RAdam and Adam divide by moments that are hardly larger.
TRAINING = 2e-3

#: A training step's losses and gradients in float32 by two ways that round differently: a model called as a whole or by
#: its network, eager or compiled, one batch or two halves of it.
STEP_VALUE = 1e-4

#: What three steps of RAdam at a large learning rate change in plain PyTorch, against float64 (on a GPU float32): each
#: tensor as a part of its largest change, less the rounding of the weights themselves. Small networks measure 4e-5 to
#: 6e-5 in float32 (with LPIPS 3.6e-4), 1.9e-2 to 5.9e-2 in bfloat16, 8.3e-3 in float16; larger ones round more often.
TRAINED = {torch.float32: 1e-3, torch.bfloat16: 2e-1, torch.float16: 3e-2}
#: The floor of `error(other) <= 2 error(plain) + floor` there: other providers measure up to 1.1 times plain's error,
#: and their first loss 2e-3 in bfloat16, where plain PyTorch's happens to be 1e-4.
TRAINED_FLOOR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}

#: The losses of 60 steps of Adam on two paths, each relative to the other: rounding of the first gradients grows, as
#: Adam divides by moments that are small. Measured up to 3e-3.
CURVE = 2e-2

#: Of numbers drawn by a fuzz the floors above are a part of each sample's largest value, which is small where terms
#: cancel: x' = x + d (sigma' - sigma) of one pixel may be anything near 0. There, some four roundings of float32 are
#: allowed besides: four times what moves float64's result the most, of four draws of inputs one rounding away.
INPUT_ROUNDING = 2**-24
