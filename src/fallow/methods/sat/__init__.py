"""SAT, sparsity-accelerated training: skip unimportant FFN channels and attention heads while adapting a dense
model."""

from fallow.method import register
from fallow.methods.sat.config import SAT as SAT
from fallow.methods.sat.method import SATMethod as SATMethod

register(SAT, SATMethod)
