"""The runners of recent calls, found by what PyTorch guards compiled code with: in less than half the time of a key."""

from __future__ import annotations

import collections.abc
import logging
import typing

import torch

from flashgen.registry import generation

logger = logging.getLogger("flashgen")

Check = collections.abc.Callable[..., bool]
Runner = typing.TypeVar("Runner")
Asked = collections.abc.Hashable
"""All that a call asks for besides its tensors."""
# Of one set of options: the layers of a model are of few kinds. Each takes a check from all the later ones.
_MOST_KINDS = 4
# A program may make up options as it goes, such as a scale that is learned.
_MOST_OPTIONS = 256


class RecentRunners(typing.Generic[Runner]):
    """Runners of calls by their options and by all that PyTorch would guard their tensors by.

    These are their types, sizes, strides, dtypes and devices, whether they require a gradient, and the keys that they
    are dispatched on, those of this thread included: inside autocast, inference mode, a mode of `__torch_dispatch__` or
    a transform of `torch.func` other runners are found than outside. Alignment is not among them.
    """

    def __init__(self) -> None:
        self._kinds: dict[Asked, tuple[tuple[Check, Runner], ...]] = {}
        self._generation = -1

    def find(self, tensors: collections.abc.Sequence[torch.Tensor], options: Asked) -> Runner | None:
        """Return the runner that was kept for such a call, unless registries have changed since.

        Calls of equal options have equally many tensors.
        """
        if self._generation != generation():
            return None
        try:
            kinds = self._kinds.get(options, ())
        except TypeError:
            # Something that has no hash, and is no option: the checks of a new call will say which.
            return None
        for check, runner in kinds:
            if check(*tensors):
                return runner
        return None

    def has_room(self, options: Asked) -> bool:
        """Return whether another kind of call with these options would be kept."""
        return self._generation != generation() or len(self._kinds.get(options, ())) < _MOST_KINDS

    def keep(self, tensors: collections.abc.Sequence[torch.Tensor], options: Asked, runner: Runner) -> None:
        """Keep the runner for later calls like this one, the first few kinds of them."""
        if self._generation != generation() or len(self._kinds) >= _MOST_OPTIONS:
            self._kinds.clear()
            self._generation = generation()
        kinds = self._kinds.get(options, ())
        # What float32 runs on depends on a setting of PyTorch's, too.
        of_fp32 = tensors[0].dtype is torch.float32
        if len(kinds) < _MOST_KINDS and not of_fp32 and (check := _check_of(*tensors)) is not None:
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
