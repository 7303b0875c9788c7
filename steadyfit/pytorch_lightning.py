"""The callbacks, for the package ``pytorch_lightning``, whose ``Callback`` is another class."""

from pytorch_lightning.callbacks import Callback

from . import _hooks
from ._monitor_hooks import BlackBoxHooks, MonitorHooks


class UpdateClipping(_hooks.UpdateClippingHooks, Callback):
    __doc__ = _hooks.UpdateClippingHooks.__doc__


class BlackBox(BlackBoxHooks, Callback):
    __doc__ = BlackBoxHooks.__doc__


class GradientSpikeMonitor(MonitorHooks, Callback):
    __doc__ = MonitorHooks.__doc__
    black_box_callback = BlackBox
