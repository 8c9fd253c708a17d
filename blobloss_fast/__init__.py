"""Per-instance segmentation losses: exact blob loss and its gradient in one pass over the volume each way."""

from . import criteria
from ._backends import backends
from .functional import blob_loss, blob_loss_instances, blob_loss_terms, cc_loss
from .labelling import connected_components, nearest_instance
from .losses import BlobLoss, CCLoss
from .stats import segment_stats

__version__ = "0.1.0"

__all__ = [
    "BlobLoss",
    "CCLoss",
    "backends",
    "blob_loss",
    "blob_loss_instances",
    "blob_loss_terms",
    "cc_loss",
    "connected_components",
    "criteria",
    "nearest_instance",
    "segment_stats",
]
