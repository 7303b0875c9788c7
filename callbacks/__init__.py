"""Callbacks, one per file, and what keeps a run folder whole."""

from callbacks.clipping import (
    AdaptiveGradientClipping,
    GradientNormClipping,
    UpdateClipping,
)
from callbacks.compile import Compile
from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.correction_table import CorrectionTable
from callbacks.freeze import Freeze
from callbacks.gradient_spikes import GradientSpikeMonitor
from callbacks.hidden_gradients import HiddenGradients
from callbacks.learning_curves import LearningCurves
from callbacks.lookahead import Lookahead
from callbacks.masked_accuracy import MaskedAccuracy
from callbacks.mistakes import Mistakes
from callbacks.progress import ProgressBar
from callbacks.run_folder import AtomicCheckpointIO, BestCheckpoint, MetricsCSV, RunRecord
from callbacks.sample_sheet import SampleSheet
from callbacks.spike_pictures import SpikePictures
from callbacks.submission_log import SubmissionLog
from callbacks.termination import Termination
from callbacks.training_cost import TrainingCost
from callbacks.wandb_logger import ResumableWandbLogger

__all__ = [
    "AdaptiveGradientClipping",
    "AtomicCheckpointIO",
    "BestCheckpoint",
    "Compile",
    "ConfusionMatrix",
    "CorrectionTable",
    "Freeze",
    "GradientNormClipping",
    "GradientSpikeMonitor",
    "HiddenGradients",
    "LearningCurves",
    "Lookahead",
    "MaskedAccuracy",
    "MetricsCSV",
    "Mistakes",
    "ProgressBar",
    "ResumableWandbLogger",
    "RunRecord",
    "SampleSheet",
    "SpikePictures",
    "SubmissionLog",
    "Termination",
    "TrainingCost",
    "UpdateClipping",
]
