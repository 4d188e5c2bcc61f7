"""The toy networks of the golden numbers as users of `cm` have them."""

from cmfast.compat.openai import karras_diffusion as kd
from tests.golden_utils import load
from tests.toy import toy_denoiser

TENSORS, META = load("karras_2303")
META = META["meta"]
Y = TENSORS["y"]
CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}


def toy(role="student"):
    return toy_denoiser(TENSORS, role, "edm").network


def diffusion_of(kind="bc", **options):
    return kd.KarrasDenoiser(distillation=kind == "bc", **options)
