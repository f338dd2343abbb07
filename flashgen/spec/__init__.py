"""What attention computes, as plain values; imports neither torch nor triton."""

from flashgen.spec.dtypes import DType, parse_dtype
from flashgen.spec.masks import Causal, Full, Mask, causal, full, parse_mask
from flashgen.spec.problem import PHASES, AttentionSpec, Phase, Problem, Shape
from flashgen.spec.text import parse_problem

__all__ = [
    "PHASES",
    "AttentionSpec",
    "Causal",
    "DType",
    "Full",
    "Mask",
    "Phase",
    "Problem",
    "Shape",
    "causal",
    "full",
    "parse_dtype",
    "parse_mask",
    "parse_problem",
]
