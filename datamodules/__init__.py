"""Data sets, one per file: what is read, how it is served, and how predictions are handed in."""

from datamodules.cifar10 import CIFAR10DataModule
from datamodules.demo import DemoDataModule
from datamodules.digits import DigitsDataModule
from datamodules.echo import EchoDataModule
from datamodules.grammar import GrammarDataModule
from datamodules.image_folder import ImageFolderDataModule
from datamodules.kaggle_cifar10 import KaggleCIFAR10DataModule
from datamodules.last_names import LastNamesDataModule
from datamodules.masked_books import MaskedBooksDataModule
from datamodules.mnist import MNISTDataModule
from datamodules.running_mean import RunningMeanDataModule
from datamodules.temporal_order import TemporalOrderDataModule
from datamodules.ucsb_cifar10 import UCSBCIFAR10DataModule

__all__ = [
    "CIFAR10DataModule",
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
    "UCSBCIFAR10DataModule",
]
