"""Why the other modules of torch have no rule, and what to use instead."""

from __future__ import annotations

from torch import nn

from stableopt.nn.dispatch import refuse

__all__: list[str] = []

_ATTENTION = (
    "dot-product attention multiplies its input by itself, so its slope grows with the input. Use stableopt.nn.ClippedAttention or "
    "TransformerBlock, which clip queries, keys and values and have a constant for every length in the norm 'token_max'; "
    "ClippedAttention.from_torch takes the weights over"
)
_RECURRENT = (
    "it is one step of a recurrence, a map of an input and a state. Ask stableopt.nn.cell_bound for its constants, and keep it "
    "contracting by stableopt.nn.contracting"
)
_LOSS = "it is a loss, which compares its input with a target. Bound the model without it"
_TWO = "it takes two inputs. Register a rule for the module that calls it"
_CONTAINER = "it is a container without a forward map. Write the model as nested nn.Sequential"

_REASONS: dict[str, tuple[str, ...]] = {
    _ATTENTION: (
        "MultiheadAttention", "Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder",
        "TransformerEncoderLayer",
    ),
    _RECURRENT: ("GRUCell", "LSTMCell", "RNNCell", "RNNCellBase"),
    _TWO: ("CosineSimilarity", "PairwiseDistance"),
    _CONTAINER: ("Module", "Container", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList"),
    "it is the base of RNN, GRU and LSTM. Use one of them, which have rules": ("RNNBase",),
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
