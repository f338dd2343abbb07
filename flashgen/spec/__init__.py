"""What attention computes, as plain values; imports neither torch nor triton."""

from flashgen.spec.dtypes import DType, parse_dtype
from flashgen.spec.extras import Extras
from flashgen.spec.masks import Causal, Full, Mask, Positions, causal, full
from flashgen.spec.masks.text import parse_mask
from flashgen.spec.problem import PHASES, AttentionSpec, Phase, Problem, Shape
from flashgen.spec.text import parse_problem

__all__ = [
    "PHASES",
    "AttentionSpec",
    "Causal",
    "DType",
    "Extras",
    "Full",
    "Mask",
    "Phase",
    "Positions",
    "Problem",
    "Shape",
    "causal",
    "full",
    "parse_dtype",
    "parse_mask",
    "parse_problem",
]
