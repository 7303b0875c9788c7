"""LightningModules, one per learning problem."""

from lit_models.classification import LitClassifier

__all__ = ["LitClassifier"]
