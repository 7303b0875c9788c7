"""Networks in plain PyTorch; nothing here knows Lightning or a data set."""

from lit_models.networks.attention_rnn import AttentionRNN
from lit_models.networks.beam_search import Hypotheses, beam_search, with_copy_bias
from lit_models.networks.conv_stack import ConvStack
from lit_models.networks.ensemble import Ensemble
from lit_models.networks.lenet import LeNet5
from lit_models.networks.masked_language import MaskedLanguageModel
from lit_models.networks.recurrent import GRU, LSTM, RNN, BidirectionalLSTM, Recurrent
from lit_models.networks.resnet import ResNet
from lit_models.networks.resnet9 import ResNet9
from lit_models.networks.transformer import Transformer
from lit_models.networks.unrolled import GatedRNN, VanillaLSTM, VanillaRNN
from lit_models.networks.whitened_cnn import WhitenedCNN
from lit_models.networks.wide_resnet import WideResNet

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AttentionRNN",
    "BidirectionalLSTM",
    "ConvStack",
    "Ensemble",
    "GatedRNN",
    "Hypotheses",
    "LeNet5",
    "MaskedLanguageModel",
    "Recurrent",
    "ResNet",
    "ResNet9",
    "Transformer",
    "VanillaLSTM",
    "VanillaRNN",
    "WhitenedCNN",
    "WideResNet",
    "beam_search",
    "with_copy_bias",
]
