"""Weightings: from the losses of a batch to one number to call ``backward`` on."""

from .base import LossWeighting
from .dwa import DWA
from .famo import FAMO
from .gradnorm import GradNorm
from .random import RandomWeighting
from .static import StaticWeighting
from .uncertainty import UncertaintyWeighting

WEIGHTINGS: dict[str, type[LossWeighting]] = {
    "static": StaticWeighting,
    "uncertainty": UncertaintyWeighting,
    "dwa": DWA,
    "gradnorm": GradNorm,
    "famo": FAMO,
    "random": RandomWeighting,
}

__all__ = [
    "DWA",
    "FAMO",
    "WEIGHTINGS",
    "GradNorm",
    "LossWeighting",
    "RandomWeighting",
    "StaticWeighting",
    "UncertaintyWeighting",
]
