"""Reads images in workers that are spawned, as on macOS and Windows, and asks another such process what it has."""

import json
import multiprocessing
import sys

from cm import image_datasets
from cm.karras_diffusion import KarrasDenoiser


def spawned():
    """Called in the other process."""
    return {"rho": KarrasDenoiser().rho, "module": KarrasDenoiser.__module__}


def main():
    data_dir, facts = sys.argv[1:]
    multiprocessing.set_start_method("spawn")
    images, _ = next(image_datasets.load_data(data_dir=data_dir, batch_size=2, image_size=8))
    with multiprocessing.Pool(1) as pool, open(facts, "w") as file:
        json.dump(pool.apply(spawned) | {"images": list(images.shape), "path": sys.path[0]}, file)


if __name__ == "__main__":
    main()
