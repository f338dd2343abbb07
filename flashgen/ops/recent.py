"""The runners of recent calls, found by what PyTorch guards compiled code with: in less than half the time of a key."""

from __future__ import annotations

import collections.abc
import logging
import typing

import torch

from flashgen.ops.call import Options
from flashgen.ops.runtime import Runner
from flashgen.registry import generation

logger = logging.getLogger("flashgen")

Check = collections.abc.Callable[[torch.Tensor, torch.Tensor, torch.Tensor], bool]
# Of one set of options: the layers of a model are of few kinds. Each takes a check from all the later ones.
_MOST_KINDS = 4


class RecentRunners:
    """Runners of calls of nothing but Q, K and V, by options and by their sizes, strides, dtypes and devices."""

    def __init__(self) -> None:
        self._kinds: dict[Options, tuple[tuple[Check, Runner], ...]] = {}
        self._generation = -1

    def find(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Runner | None:
        """Return the runner that was kept for such a call, unless registries have changed since."""
        if self._generation != generation():
            return None
        for check, runner in self._kinds.get(options, ()):
            if check(q, k, v):
                return runner
        return None

    def keep(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, runner: Runner) -> None:
        """Keep the runner for later calls like this one, the first few kinds of them."""
        if self._generation != generation():
            self._kinds.clear()
            self._generation = generation()
        kinds = self._kinds.get(options, ())
        # What float32 runs on depends on a setting of PyTorch's, too.
        if len(kinds) < _MOST_KINDS and q.dtype is not torch.float32 and (check := _check_of(q, k, v)) is not None:
            self._kinds[options] = (*kinds, (check, runner))

    def clear(self) -> None:
        """Forget all of them."""
        self._kinds.clear()


def _check_of(*tensors: torch.Tensor) -> Check | None:
    """Return whether tensors are like these, as a function; None where this PyTorch has none."""
    try:
        guards: typing.Any = torch._C._dynamo.guards
        check: Check = guards.TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        ).check
        return check if check(*tensors) else None
    except Exception as error:
        # Not a public class: without it, calls are found by their keys.
        logger.debug("PyTorch's guards are not used: %s: %s", type(error).__name__, error)
        return None
