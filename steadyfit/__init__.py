"""Spike detection and clipping of updates, for any PyTorch training loop.

In plain torch: ``SpikeDetector`` says of every value of a signal whether it is a spike,
``StepProbe`` what an optimizer step did to the parameters, ``clip_updates`` shortens what spikes
are made of, ``SpikeMonitor`` judges steps and keeps records. For Lightning: ``UpdateClipping`` and
``GradientSpikeMonitor``, callbacks that are imported when they are asked for; a project of the
package ``pytorch_lightning`` takes both from :mod:`steadyfit.pytorch_lightning`.
"""

from typing import TYPE_CHECKING, Any

from .clipping import UpdateLimit, clip_updates
from .detector import SpikeDetector
from .probe import StepProbe
from .watching.monitor import SpikeMonitor
from .watching.reactions import Reaction
from .watching.records import read_records

if TYPE_CHECKING:
    from .lightning import GradientSpikeMonitor as GradientSpikeMonitor
    from .lightning import UpdateClipping as UpdateClipping

__version__ = "0.1.0"

__all__ = [  # the callbacks are left out: `import *` must do without Lightning
    "Reaction",
    "SpikeDetector",
    "SpikeMonitor",
    "StepProbe",
    "UpdateLimit",
    "clip_updates",
    "read_records",
]


def __getattr__(name: str) -> Any:
    if name not in ("GradientSpikeMonitor", "UpdateClipping"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import lightning
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} is a callback of Lightning, which is not installed ({error}); "
            "pip install 'steadyfit[lightning]', or use clip_updates and SpikeDetector in a loop "
            "of your own."
        ) from None
    return getattr(lightning, name)
