"""Why the other modules of torch have no rule, and what to use instead."""

from __future__ import annotations

from torch import nn

from stableopt.nn.dispatch import refuse

__all__: list[str] = []

_ATTENTION = (
    "dot-product attention multiplies its input by itself, so its slope grows with the input. Use attention with a fixed memory "
    "(a gradient block with softmax), or mix tokens by a linear layer"
)
_RECURRENT = (
    "its gates multiply states, and it returns several tensors over a time of unknown length. Unroll it into layers with a "
    "constant, for example GradientBlock, or bound its weights by stableopt.nn.stabilize with radius="
)
_LOSS = "it is a loss, which compares its input with a target. Bound the model without it"
_TWO = "it takes two inputs. Register a rule for the module that calls it"
_CONTAINER = "it is a container without a forward map. Write the model as nested nn.Sequential"

_REASONS: dict[str, tuple[str, ...]] = {
    _ATTENTION: (
        "MultiheadAttention", "Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder",
        "TransformerEncoderLayer",
    ),
    _RECURRENT: ("GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNBase", "RNNCell", "RNNCellBase"),
    _TWO: ("CosineSimilarity", "PairwiseDistance"),
    _CONTAINER: ("Module", "Container", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList"),
    "it needs the indices of a pool as a second input. Use nn.Upsample or a transposed convolution": (
        "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d",
    ),
    "it divides by a power of a sum over channels, for which no constant is proved. Use a normalization with stored statistics": (
        "LocalResponseNorm", "CrossMapLRN2d",
    ),
    "it runs replicas of another module. Pass that module itself, model.module": ("DataParallel",),
    _LOSS: (
        "AdaptiveLogSoftmaxWithLoss", "BCELoss", "BCEWithLogitsLoss", "CTCLoss", "CosineEmbeddingLoss", "CrossEntropyLoss",
        "GaussianNLLLoss", "HingeEmbeddingLoss", "HuberLoss", "KLDivLoss", "L1Loss", "MSELoss", "MarginRankingLoss",
        "MultiLabelMarginLoss", "MultiLabelSoftMarginLoss", "MultiMarginLoss", "NLLLoss", "NLLLoss2d", "PoissonNLLLoss",
        "SmoothL1Loss", "SoftMarginLoss", "TripletMarginLoss", "TripletMarginWithDistanceLoss", "LinearCrossEntropyLoss",
    ),
}  # fmt: skip

for _reason, _names in _REASONS.items():
    for _name in _names:
        _kind = getattr(nn, _name, None)  # some exist in a few versions of torch only
        if isinstance(_kind, type):
            refuse(_kind, _reason)
