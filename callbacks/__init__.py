"""Callbacks, one per file, and what keeps a run folder whole."""

from callbacks.pictures.confusion_matrix import ConfusionMatrix
from callbacks.pictures.hidden_gradients import HiddenGradients
from callbacks.pictures.learning_curves import LearningCurves
from callbacks.pictures.mistakes import Mistakes
from callbacks.pictures.sample_sheet import SampleSheet
from callbacks.pictures.spike_pictures import SpikePictures
from callbacks.run.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from callbacks.run.correction_table import CorrectionTable
from callbacks.run.masked_accuracy import MaskedAccuracy
from callbacks.run.progress import ProgressBar
from callbacks.run.run_folder import MetricsCSV, RunRecord
from callbacks.run.submission_log import SubmissionLog
from callbacks.run.termination import Termination
from callbacks.run.wandb_logger import ResumableWandbLogger
from callbacks.training.compile import Compile
from callbacks.training.freeze import Freeze
from callbacks.training.learning_rate import LearningRateMonitor
from callbacks.training.lookahead import Lookahead
from callbacks.training.timing import Timing
from callbacks.training.training_cost import TrainingCost
from steadyfit.lightning import GradientSpikeMonitor, UpdateClipping

__all__ = [
    "AtomicCheckpointIO",
    "BestCheckpoint",
    "Compile",
    "ConfusionMatrix",
    "CorrectionTable",
    "Freeze",
    "GradientSpikeMonitor",
    "HiddenGradients",
    "LastCheckpoint",
    "LearningCurves",
    "LearningRateMonitor",
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
    "Timing",
    "TrainingCost",
    "UpdateClipping",
]
