"""LightningModules, one per learning problem."""

from lit_models.classification import LitClassifier
from lit_models.fixmatch import LitFixMatch

__all__ = ["LitClassifier", "LitFixMatch"]
