"""Callbacks that shorten updates or gradients; ``UpdateClipping`` is the one to start with.

    callbacks:
    - class_path: callbacks.UpdateClipping
      init_args: {max_rms: 1.0, max_decrease: 0.5}

It lives in ``steadyfit``, the spike library, which can be installed by itself; the two that clip
gradients, which docs/spikes.md compares it with, are in training/gradient_clipping.py.
"""

from callbacks.training.gradient_clipping import AdaptiveGradientClipping, GradientNormClipping
from steadyfit import UpdateClipping

__all__ = ["AdaptiveGradientClipping", "GradientNormClipping", "UpdateClipping"]
