"""What tests of loading and saving share."""

import torch

# What shapes do not show of `golden_utils.small_unet`.
ASKED = {"image_size": 8, "num_head_channels": 16}


def same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
