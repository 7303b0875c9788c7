"""LightningModules, one per learning problem."""

from lit_models.classification import LitClassifier
from lit_models.cutmix import LitCutMix
from lit_models.fixmatch import LitFixMatch
from lit_models.regression import LitRegressor
from lit_models.seq2seq import LitSeq2Seq
from lit_models.trained import load

__all__ = ["LitClassifier", "LitCutMix", "LitFixMatch", "LitRegressor", "LitSeq2Seq", "load"]
