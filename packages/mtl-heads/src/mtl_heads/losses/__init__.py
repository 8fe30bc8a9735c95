"""Losses that know which labels are present. Names say what they compute: NCE, InfoNCE and sampled softmax differ."""

from .binary import binary_cross_entropy, class_balanced_weights, focal_loss, product_logit
from .contrastive import info_nce_loss, supervised_contrastive_loss
from .gather_dot import gather_dot
from .lifetime import ziln_loss, ziln_mean
from .ordinal import ordinal_loss, ordinal_probabilities
from .propensity import diversity_loss, novelty_loss
from .ranking import bpr_loss, order_penalty
from .regression import regression_loss, vector_loss
from .sampled import nce_loss, sampled_softmax_loss
from .softmax import softmax_cross_entropy, softmax_focal_loss

__all__ = [
    "binary_cross_entropy",
    "bpr_loss",
    "class_balanced_weights",
    "diversity_loss",
    "focal_loss",
    "gather_dot",
    "info_nce_loss",
    "nce_loss",
    "novelty_loss",
    "order_penalty",
    "ordinal_loss",
    "ordinal_probabilities",
    "product_logit",
    "regression_loss",
    "sampled_softmax_loss",
    "softmax_cross_entropy",
    "softmax_focal_loss",
    "supervised_contrastive_loss",
    "vector_loss",
    "ziln_loss",
    "ziln_mean",
]
