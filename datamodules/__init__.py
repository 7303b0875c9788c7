"""Data sets, one per file: what is read, how it is served, and how predictions are handed in."""

from datamodules.images.cifar10 import CIFAR10DataModule
from datamodules.images.competition import CompetitionDataModule
from datamodules.images.demo import DemoDataModule
from datamodules.images.digits import DigitsDataModule
from datamodules.images.image_folder import ImageFolderDataModule
from datamodules.images.kaggle_cifar10 import KaggleCIFAR10DataModule
from datamodules.images.mnist import MNISTDataModule
from datamodules.images.torch_dataset import TorchDatasetDataModule
from datamodules.images.ucsb_cifar10 import UCSBCIFAR10DataModule
from datamodules.sequences.echo import EchoDataModule
from datamodules.sequences.last_names import LastNamesDataModule
from datamodules.sequences.running_mean import RunningMeanDataModule
from datamodules.sequences.temporal_order import TemporalOrderDataModule
from datamodules.text.grammar import GrammarDataModule
from datamodules.text.masked_books import MaskedBooksDataModule

__all__ = [
    "CIFAR10DataModule",
    "CompetitionDataModule",
    "DemoDataModule",
    "DigitsDataModule",
    "EchoDataModule",
    "GrammarDataModule",
    "ImageFolderDataModule",
    "KaggleCIFAR10DataModule",
    "LastNamesDataModule",
    "MNISTDataModule",
    "MaskedBooksDataModule",
    "RunningMeanDataModule",
    "TemporalOrderDataModule",
    "TorchDatasetDataModule",
    "UCSBCIFAR10DataModule",
]
