"""What a classifier of images has to beat."""

import numpy as np

from datamodules.base import BaseDataModule


def svm_baseline(data: BaseDataModule) -> float:
    """Test accuracy (fraction) of a support vector machine on the same pixels.

    With Gaussian kernels, on 60 principal components of the training part; of a few thousand small
    images it takes seconds, of 50,000 minutes.
    """
    from sklearn.decomposition import PCA  # seconds of imports
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    ((images, targets, _), _), (test_images, test_targets) = data.read_parts(), data.read_test()
    inputs, test_inputs = (x.flatten(1).numpy() / np.float32(255) for x in (images, test_images))
    model = make_pipeline(PCA(60, random_state=0), StandardScaler(), SVC(C=10, gamma=0.01))
    return float(model.fit(inputs, targets).score(test_inputs, test_targets))
