"""The callbacks, for the package ``lightning``."""

from lightning.pytorch.callbacks import Callback

from . import _hooks
from ._hooks import scale_left
from ._monitor_hooks import BlackBoxHooks, MonitorHooks

__all__ = ["GradientSpikeMonitor", "StepCallback", "UpdateClipping", "scale_left"]


class StepCallback(_hooks.StepHooks, Callback):
    __doc__ = _hooks.StepHooks.__doc__


class UpdateClipping(_hooks.UpdateClippingHooks, StepCallback):
    __doc__ = _hooks.UpdateClippingHooks.__doc__


class BlackBox(BlackBoxHooks, Callback):
    __doc__ = BlackBoxHooks.__doc__


class GradientSpikeMonitor(MonitorHooks, StepCallback):
    __doc__ = MonitorHooks.__doc__
    black_box_callback = BlackBox
