"""Optimizers that torch does not have."""

from lit_models.optimizers.bias_scaled_sgd import BiasScaledSGD
from lit_models.optimizers.muon import Muon
from lit_models.optimizers.muon_sgd import MuonSGD

__all__ = ["BiasScaledSGD", "Muon", "MuonSGD"]
