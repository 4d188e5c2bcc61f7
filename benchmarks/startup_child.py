"""A new process that imports, makes a provider of images and its first batch, and prints as JSON what that took."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

#: Batches after the first, of which the fastest counts.
LATER = 3


def main(argv: list[str] | None = None) -> None:
    """Seconds count from `--begun`, when the process was asked for; making random weights is taken off."""
    parser = argparse.ArgumentParser()
    for name in ("provider", "network", "device"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--begun", type=float, required=True)
    parser.add_argument("--openai", type=Path)
    options = parser.parse_args(argv)

    import torch

    from cmfast.benchmarks import memory
    from cmfast.benchmarks.gate import Gate
    from cmfast.benchmarks.kernels import inductor_refusal
    from cmfast.benchmarks.liveness import weight_bytes
    from cmfast.benchmarks.original import Missing
    from cmfast.benchmarks.providers import COMPILED, PROVIDERS, Models, Trial

    device = torch.device(options.device)
    import_s = time.time() - options.begun
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models, trial = Models(options.network, device, dtype, options.openai), Trial(options.batch, (options.provider,))
    weights, before = weight_bytes(options.network, dtype), memory.settled(device)
    start = time.perf_counter()
    try:
        refusal = inductor_refusal(device) if options.provider in COMPILED else None
        if refusal:
            raise Missing(refusal)
        provider = PROVIDERS[options.provider](models, trial)
    except Missing as missing:
        print(json.dumps({"missing": str(missing)}))
        return
    provider.sample(options.batch)
    make_s = time.perf_counter() - start
    peak, later = memory.peak(device), []
    for _ in range(LATER):
        start = time.perf_counter()
        provider.sample(options.batch)
        later.append(time.perf_counter() - start)
    said: dict[str, Any] = {
        "import_s": import_s, "make_s": make_s, "first_images_s": import_s + make_s, "call_s": min(later),
        "dtype": str(provider.dtype).removeprefix("torch."), "note": provider.note, "weight_bytes": weights,
        "peak_bytes": None, "wrong": Gate(models, trial).wrong(provider),
    }  # fmt: skip
    if before is not None and peak is not None:
        # A provider of the weights that were there before has them, too.
        said["peak_bytes"] = peak.reserved - before.reserved + (weights if provider.shares_weights else 0)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
