"""Which step spiked, which parameter was behind it, what the update did and what followed.

    callbacks:
    - class_path: callbacks.GradientSpikeMonitor
      init_args: {reaction: log}  # or skip, rollback, stop

It lives in ``steadyfit``, the spike library: that is what can be installed by itself, and used in
other training loops than this repository's.
"""

from steadyfit import GradientSpikeMonitor

__all__ = ["GradientSpikeMonitor"]
