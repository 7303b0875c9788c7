"""CIFAR-10 as the Kaggle competition `cifar-10` hands it out: numbered PNG files and two tables."""

from typing import Any

from datamodules.images.cifar10 import CLASS_NAMES
from datamodules.images.competition import CompetitionDataModule


class KaggleCIFAR10DataModule(CompetitionDataModule):
    """Train on the 50,000 labelled images of the competition and predict the other 300,000.

    ``data_dir/kaggle-cifar10``, ``data_dir/cifar-10`` or ``data_dir`` itself holds
    ``trainLabels.csv``, ``sampleSubmission.csv`` and the images in ``train/`` and ``test/`` or, as
    they are downloaded, in ``train.7z`` and ``test.7z``. Of the test images 10,000 are those of
    CIFAR-10; the rest are not scored.

    Args:
        data_dir: Root folder of all data sets, or the competition's own.
        cache_dir: Where unpacked and decoded images are kept; by default beside the data or, where
            that cannot be written, in the user's cache folder.
        options: What :class:`ImageDataModule` takes.
    """

    class_names = CLASS_NAMES
    competition = "cifar-10"
    finds_classes = False
    folder_names = ("kaggle-cifar10",)

    def __init__(
        self, data_dir: str = "data", cache_dir: str | None = None, **options: Any
    ) -> None:
        super().__init__(
            competition="cifar-10",
            data_dir=data_dir,
            image_size=(32, 32, 3),
            class_names=list(CLASS_NAMES),
            labels=None,
            sample=None,
            probability_of=None,
            cache_dir=cache_dir,
            **options,
        )
        self.label_table = self.folder / "trainLabels.csv"
