"""The arguments of a U-Net from the names and shapes of its weights, and what to say where the two disagree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# What shapes do not tell, for the two published architectures, which are recognised by what shapes do tell.
PUBLISHED = {
    "ImageNet-64": (
        {
            "in_channels": 3,
            "model_channels": 192,
            "out_channels": 3,
            "num_res_blocks": 3,
            "attention_resolutions": [2, 4, 8],
            "channel_mult": [1, 2, 3, 4],
            "conv_resample": True,
            "dims": 2,
            "num_classes": 1000,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        {"image_size": 64, "num_head_channels": 64},
    ),
    "LSUN-256": (
        {
            "in_channels": 3,
            "model_channels": 256,
            "out_channels": 3,
            "num_res_blocks": 2,
            "attention_resolutions": [8, 16, 32],
            "channel_mult": [1, 1, 2, 2, 4, 4],
            "conv_resample": True,
            "dims": 2,
            "num_classes": None,
            "use_scale_shift_norm": False,
            "resblock_updown": True,
        },
        {"image_size": 256, "num_head_channels": 64},
    ),
}


def from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The arguments of `UNetModel` that shapes determine, and the rest of a published architecture.

    Missing from the result, unless the architecture is a published one: `image_size` and the attention heads
    (`num_head_channels` or `num_heads`). Dropout leaves no trace in weights: its default is 0.

    Raises:
        ValueError: the names are not those of this U-Net.

    >>> from cmfast.unet import UNetModel
    >>> model = UNetModel(8, 3, 32, 3, 2, [2], channel_mult=(1, 2), num_classes=10)
    >>> config = from_shapes({name: tuple(p.shape) for name, p in model.state_dict().items()})
    >>> config["num_res_blocks"], config["channel_mult"], config["attention_resolutions"]
    (2, [1, 2], [2])
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            some = ", ".join(list(shapes)[:3])
            raise ValueError(f"these are not the weights of this U-Net: {name} is missing (there are {some}, ...)")
        if len(shapes[name]) < 2 or 0 in shapes[name]:
            raise ValueError(f"these are not the weights of this U-Net: {name} is {list(shapes[name])}")
        return shapes[name]

    first = shape("input_blocks.0.0.weight")
    model_channels = shape("time_embed.0.weight")[1]
    num_blocks = len({name.split(".")[1] for name in shapes if name.startswith("output_blocks.")})
    num_levels, resampling = _levels(shapes, num_blocks)
    if num_blocks == 0 or num_blocks % num_levels:
        raise ValueError(f"these are not the weights of this U-Net: {num_blocks} output blocks in {num_levels} levels")
    per_level = num_blocks // num_levels

    attention, channel_mult = [], []
    for level in range(num_levels):
        block = f"output_blocks.{(num_levels - 1 - level) * per_level}"  # the first of its level
        width = shape(f"{block}.0.out_layers.3.weight")[0]
        channel_mult.append(width // model_channels if width % model_channels == 0 else width / model_channels)
        if f"{block}.1.qkv.weight" in shapes:
            attention.append(2**level)

    config = {
        "in_channels": first[1],
        "model_channels": model_channels,
        "out_channels": shape("out.2.weight")[0],
        "num_res_blocks": per_level - 1,
        "attention_resolutions": attention,
        "channel_mult": channel_mult,
        "conv_resample": resampling != "pool",
        "dims": len(first) - 2,
        "num_classes": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        "use_scale_shift_norm": shape("middle_block.0.emb_layers.1.weight")[0]
        == 2 * shape("middle_block.0.out_layers.3.weight")[0],
        "resblock_updown": resampling == "resblock",
    }
    for known, rest in PUBLISHED.values():
        if config == known:
            config |= rest
    return config


def _levels(shapes: Shapes, num_blocks: int) -> tuple[int, str]:
    """The number of levels, and whether they are resampled by "resblock", "conv" or "pool"."""
    resblocks = sum(bool(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", n)) for n in shapes)
    convs = sum(bool(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", n)) for n in shapes)
    if resblocks or convs:
        return (resblocks or convs) + 1, "resblock" if resblocks else "conv"
    # Pooling has no weights: its input blocks are gaps in the numbering. With one level there is nothing to tell.
    present = {name.split(".")[1] for name in shapes if name.startswith("input_blocks.")}
    gaps = num_blocks - len(present)
    return gaps + 1, "pool" if gaps else "conv"


def disagreement(expected: Shapes, found: Shapes) -> str | None:
    """What is missing, extra or of another shape, and the argument that may be wrong; None where all agrees.

    >>> print(disagreement({"label_emb.weight": (10, 128)}, {}))
    1 tensor missing (label_emb.weight) - check num_classes (class_cond in the original)
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    if not (missing or extra or wrong):
        return None

    parts = []
    for kind, names in (("missing", missing), ("not expected", extra), ("of another shape", wrong)):
        if names:
            listed = [
                f"{name}: {list(found[name])} in the file, {list(expected[name])} in the model"
                if kind == "of another shape"
                else name
                for name in names[:3]
            ]
            more = ", ..." if len(names) > 3 else ""
            plural = "tensor" if len(names) == 1 else "tensors"
            parts.append(f"{len(names)} {plural} {kind} ({', '.join(listed)}{more})")
    hints = [_hint(name, expected.get(name), found.get(name)) for name in missing + extra + wrong]
    advice = " and ".join(dict.fromkeys(hint for hint in hints if hint))
    return "; ".join(parts) + (f" - check {advice}" if advice else "")


def _hint(name: str, expected: tuple[int, ...] | None, found: tuple[int, ...] | None) -> str | None:
    """The argument that decides whether tensor `name` exists and how large it is."""
    if name == "label_emb.weight":
        return "num_classes (class_cond in the original)"
    if expected and found:
        rows = sorted((expected[0], found[0]))
        if ".emb_layers.1." in name and rows[1] == 2 * rows[0]:
            return "use_scale_shift_norm"
        if name == "input_blocks.0.0.weight" and expected[0] == found[0]:
            return "in_channels" if len(expected) == len(found) else "dims"
        if name.startswith("out.2."):
            return "out_channels" if rows[0] != rows[1] else None
        return "model_channels" if name.startswith("time_embed.") else None
    if re.search(r"\.(qkv|proj_out|norm)\.(weight|bias)$", name):
        return "attention_resolutions"
    if re.search(r"\.(op|conv)\.(weight|bias)$", name):
        return "resblock_updown and conv_resample"
    if re.search(r"put_blocks\.\d+\.0\.in_layers\.0\.weight$", name):
        return "num_res_blocks and channel_mult"
    return None
