"""From a problem to the kernel that runs it."""

from flashgen.dispatch.select import is_stale, select
from flashgen.dispatch.selection import RUNGS, Refusal, Rung, Selection

__all__ = ["RUNGS", "Refusal", "Rung", "Selection", "is_stale", "select"]
