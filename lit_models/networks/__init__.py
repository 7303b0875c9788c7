"""Networks in plain PyTorch; nothing here knows Lightning or a data set."""

from lit_models.networks.ensemble import Ensemble
from lit_models.networks.lenet import LeNet5
from lit_models.networks.recurrent import LSTM, RNN
from lit_models.networks.resnet import ResNet
from lit_models.networks.whitened_cnn import WhitenedCNN

__all__ = ["LSTM", "RNN", "Ensemble", "LeNet5", "ResNet", "WhitenedCNN"]
