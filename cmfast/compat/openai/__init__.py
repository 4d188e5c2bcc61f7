"""The modules of openai/consistency_models' package `cm` that sampling needs: same names, same numbers.

    from cmfast.compat.openai.karras_diffusion import KarrasDenoiser, karras_sample    # was: from cm.karras_diffusion
    python -m cmfast.compat.openai scripts/image_sample.py --model_path ...            # a script as it is

They translate names; what is computed is computed by the rest of cmfast. None needs mpi4py, blobfile or flash-attn.
"""

#: The modules, by their names in `cm`.
MODULES = ("dist_util", "karras_diffusion", "logger", "nn", "random_util", "script_util", "unet")
