"""`torch.ops.flashgen.attention_forward`: one raw operator that holds the dispatcher.

Raw (`Library.define`) and not `custom_op`, which costs 2 us more a call; not `triton_op`, which freezes the choice of
kernel at trace time.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import math
import typing
from collections.abc import Iterator

import torch
import torch.utils.flop_counter

from flashgen.codegen import KernelConfig, config_from_dict
from flashgen.codegen.constraints import require_legal
from flashgen.errors import UnsupportedError
from flashgen.launch import interpret_forward
from flashgen.measure import attention_reference
from flashgen.ops.checks import Layout, check_layout, heads_first, problem_of
from flashgen.ops.runtime import Options, Outputs, Runner, choose, logger, prepare, say_copied
from flashgen.registry import generation
from flashgen.resources import interpret_requested
from flashgen.spec import parse_mask
from flashgen.target import named_target

_SCHEMA = (
    "attention_forward(Tensor q, Tensor k, Tensor v, str mask, float softmax_scale, str layout, bool return_lse, "
    "str config, str registry) -> (Tensor, Tensor)"
)
# Lengths change from call to call in some programs: past this many kinds of call, the memo starts anew.
_MEMO_LIMIT = 8192
# CPU tensors know no GPU: what runs for them, and is explained, is the choice for Hopper.
INTERPRETED_AS = named_target("sm_90")
_memo: dict[tuple[object, ...], Runner] = {}
_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("flashgen_interpreting", default=False)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Run CPU tensors through Triton's interpreter inside this block: the very kernel, about 1 ms a tile."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str,
    softmax_scale: float | None,
    layout: str,
    return_lse: bool,
    config: str,
    registry: str,
) -> Outputs:
    """Return out, and lse where asked for: through PyTorch's dispatcher where it has a part in the call.

    Where it has none the body is called directly, which saves a third of the host's time.
    """
    if torch.compiler.is_compiling() or not _plain(q, k, v):
        out, lse = torch.ops.flashgen.attention_forward(
            q, k, v, mask, _scale(q, softmax_scale), layout, return_lse, config, registry
        )
        return out, lse if return_lse else None
    return forward(q, k, v, mask, softmax_scale, layout, return_lse, config, registry)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Return whether no subclass, mode, function transform or profiler wants to see the operator."""
    return (
        type(q) is torch.Tensor
        and type(k) is torch.Tensor
        and type(v) is torch.Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._autograd._profiler_enabled()
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str,
    softmax_scale: float | None,
    layout: str,
    return_lse: bool,
    config: str,
    registry: str,
) -> Outputs:
    """Return out, and lse where asked for: select, compile and bind on the first call of a kind, then only launch."""
    if not q.is_cuda:
        if q.is_meta:
            out, lse = _fake_forward(q, k, v, mask, _scale(q, softmax_scale), layout, return_lse, config, registry)
            return out, lse if return_lse else None
        options = _options(mask, _scale(q, softmax_scale), layout, return_lse, config, registry)
        return _forward_cpu(q, k, v, options)
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15:
        say_copied("tensors that are not 16-byte aligned")
        q, k, v = (t.clone(memory_format=torch.contiguous_format) if t.data_ptr() & 15 else t for t in (q, k, v))
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, mask, softmax_scale, layout, return_lse, config, registry, generation(),
    )  # fmt: skip
    runner = _memo.get(key)
    if runner is None:
        runner = prepare(q, k, v, _options(mask, _scale(q, softmax_scale), layout, return_lse, config, registry))
        if len(_memo) >= _MEMO_LIMIT:
            _memo.clear()
        _memo[key] = runner
    return runner(q, k, v)


def _scale(q: torch.Tensor, softmax_scale: float | None) -> float:
    """Return the factor of the scores, 1 / sqrt(head_dim) where the caller gave none."""
    if softmax_scale is not None:
        return float(softmax_scale)
    # A head dimension that is missing or 0 is refused later, with all else that may be wrong.
    return 1.0 / math.sqrt(q.shape[-1]) if q.dim() and q.shape[-1] else 1.0


def _options(mask: str, softmax_scale: float, layout: str, return_lse: bool, config: str, registry: str) -> Options:
    return Options(
        mask=parse_mask(mask),
        softmax_scale=softmax_scale,
        layout=check_layout(layout),
        return_lse=return_lse,
        config=decode_config(config),
        registry=registry or None,
    )


@functools.lru_cache(maxsize=256)
def encode_config(config: KernelConfig | None) -> str:
    """Return a config as the text that the operator takes; empty for None."""
    return json.dumps(config.as_dict()) if config is not None else ""


@functools.lru_cache(maxsize=256)
def decode_config(text: str) -> KernelConfig | None:
    """Return the config that `encode_config` wrote."""
    return config_from_dict(json.loads(text)) if text else None


def _forward_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Outputs:
    layout = options.layout
    problem = problem_of(q, k, v, mask=options.mask, layout=layout, lse=options.return_lse)
    if options.config is not None:
        require_legal(options.config, problem.spec, INTERPRETED_AS)
    if q.device.type != "cpu":
        raise UnsupportedError(f"flashgen runs on CUDA and ROCm GPUs and on the CPU, not on {q.device}")
    q, k, v = (heads_first(t, layout) for t in (q, k, v))
    if _interpreting.get() or interpret_requested():
        selection = choose(problem, INTERPRETED_AS, options)
        out, lse = interpret_forward(
            q if options.softmax_scale >= 0 else -q,
            k,
            v,
            problem=problem,
            config=selection.config,
            softmax_scale=abs(options.softmax_scale),
        )
    else:
        _say_eager()
        out, lse = attention_reference(
            q, k, v, mask=options.mask, softmax_scale=options.softmax_scale, precision="input"
        )
    # An operator's outputs have the strides that its fake promises.
    out = heads_first(out, layout).contiguous()
    return out, lse.float().contiguous() if lse is not None and options.return_lse else None


@functools.lru_cache(maxsize=1)
def _say_eager() -> None:
    logger.warning(
        "CPU tensors: computing attention with eager PyTorch, not with a kernel; `with flashgen.interpreting():` runs "
        "the kernel itself in Triton's interpreter"
    )


def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str,
    softmax_scale: float,
    layout: str,
    return_lse: bool,
    config: str,
    registry: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the operator's schema promises: an empty lse where none was asked for."""
    out, lse = forward(q, k, v, mask, softmax_scale, layout, return_lse, config, registry)
    return out, q.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _fake_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str,
    softmax_scale: float,
    layout: str,
    return_lse: bool,
    config: str,
    registry: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    batch, first, second = q.shape[:3]
    rows = (first, second) if check_layout(layout) == "bhsd" else (second, first)
    return out, q.new_empty((batch, *rows) if return_lse else (0,), dtype=torch.float32)


_library = torch.library.Library("flashgen", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
_library.impl("attention_forward", _forward_op, "CompositeExplicitAutograd")
torch.library.register_fake("flashgen::attention_forward", _fake_forward, lib=_library)


def attention_forward_flops(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], mask: str, softmax_scale: float, layout: Layout,
    *args: typing.Any, **kwargs: typing.Any,
) -> int:  # fmt: skip
    """Return the flops of one call for `torch.utils.flop_counter`, from the shapes of its tensors."""
    axis = 2 if layout == "bhsd" else 1
    pairs = parse_mask(mask).visible_pairs(q[axis], k[axis])
    return 2 * pairs * (q[3] + v[3]) * q[0] * q[3 - axis]


torch.utils.flop_counter.register_flop_formula(torch.ops.flashgen.attention_forward)(attention_forward_flops)
