"""The GPU that a command answers for: the one here, or one by name."""

from __future__ import annotations

import typing

from flashgen.cli.output import note
from flashgen.errors import FlashgenError, InputError
from flashgen.target import GpuTarget, named_target

if typing.TYPE_CHECKING:
    import torch

DEFAULT_TARGET = "H200"


def gpu_device(text: str | None) -> torch.device | None:
    """Return the GPU that `--device` names, the first one if it is left out, or None for `cpu` or where there is none.

    Raises:
        InputError: if the text is no device of this machine.
        FlashgenError: if it names a GPU where there is none.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        return torch.device("cuda:0") if count else None
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cpu":
        return None
    index = device.index or 0
    if count == 0:
        raise FlashgenError(f"--device {text}: there is no GPU here (torch.cuda.is_available() is False)")
    if index >= count:
        raise InputError(f"--device {text}: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def require_gpu(text: str | None, command: str) -> torch.device:
    """Return the GPU that `--device` names.

    Raises:
        FlashgenError: if there is none; the message says what `command` needs it for.
    """
    device = gpu_device(text)
    if device is None:
        raise FlashgenError(f"{command} needs a GPU, and there is none here (torch.cuda.is_available() is False)")
    return device


def resolve_target(device: str | None, target: str | None) -> GpuTarget:
    """Return the target that `--target` names, else that of the device, else the default, saying so.

    Raises:
        InputError: for an unknown name, or for both options where the device is a GPU.
    """
    if target is not None:
        if device not in (None, "cpu"):
            raise InputError(f"give either --device {device} or --target {target}: a GPU here is a target of its own")
        return named_target(target)
    gpu = gpu_device(device)
    if gpu is not None:
        from flashgen.launch import detect_target

        return detect_target(gpu)
    default = named_target(DEFAULT_TARGET)
    note(f"no GPU in use: answering for {default}; --target names another")
    return default
