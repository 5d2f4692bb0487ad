"""The x-prediction loss on pixels, and the patches that it is taken over."""

from .loss import patchify, unpatchify, x_prediction_loss

__all__ = ["patchify", "unpatchify", "x_prediction_loss"]
