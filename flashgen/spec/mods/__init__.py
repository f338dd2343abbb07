"""Mods: mask and score functions in a small language, read from plain Python or from text, evaluated or rendered."""

from flashgen.spec.mods.derivative import derivative
from flashgen.spec.mods.evaluate import TensorLike
from flashgen.spec.mods.function import CAPTURE_TYPES, Capture, ModFunction, Role, parse_mod
from flashgen.spec.mods.reader import read_mod

__all__ = ["CAPTURE_TYPES", "Capture", "ModFunction", "Role", "TensorLike", "derivative", "parse_mod", "read_mod"]
