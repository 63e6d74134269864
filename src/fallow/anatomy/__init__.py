"""Where a model keeps its FFNs, heads and linear layers: the only room that knows model families.

`inspect(model)` gives views; a view reads weights live and can be installed into the model and taken out again without
a change to any parameter, name or class. `families.py` is the table, and says how to add a family.
"""

from fallow.anatomy.attention import AttentionView, HeadGate
from fallow.anatomy.families import FAMILIES
from fallow.anatomy.ffn import ChannelParam, FFNView, FFNWeights
from fallow.anatomy.heads import HeadParam
from fallow.anatomy.inspection import Anatomy, inspect, put_relu
from fallow.anatomy.linear import LinearView, out_dim

__all__ = [
    "FAMILIES",
    "Anatomy",
    "AttentionView",
    "ChannelParam",
    "FFNView",
    "FFNWeights",
    "HeadGate",
    "HeadParam",
    "LinearView",
    "inspect",
    "out_dim",
    "put_relu",
]
