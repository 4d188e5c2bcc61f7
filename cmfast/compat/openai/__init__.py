"""The modules of openai/consistency_models' package `cm`, to sample and to train: same names, same numbers.

    from cmfast.compat.openai.karras_diffusion import KarrasDenoiser, karras_sample    # was: from cm.karras_diffusion
    python -m cmfast.compat.openai scripts/image_sample.py --model_path ...            # a script as it is
    torchrun --nproc-per-node 8 -m cmfast.compat.openai scripts/cm_train.py --data_dir ...

They translate names; what is computed is computed by the rest of cmfast. None needs mpi4py, blobfile or flash-attn.
"""

#: The modules, by their names in `cm`.
MODULES = (
    "dist_util",
    "fp16_util",
    "image_datasets",
    "karras_diffusion",
    "logger",
    "nn",
    "random_util",
    "resample",
    "script_util",
    "train_util",
    "unet",
)
