"""Decoding on CPU tensors: the kernel itself in Triton's interpreter where that is asked for, else eager PyTorch."""

from __future__ import annotations

import dataclasses

import torch

from flashgen.codegen import TritonDecodeConfig
from flashgen.codegen.constraints import require_legal
from flashgen.errors import UnsupportedError
from flashgen.launch import interpret_decode
from flashgen.measure import append_to_cache, decode_reference
from flashgen.ops.call import decode_config, heads_first
from flashgen.ops.cpu import INTERPRETED_AS, is_interpreting, say_eager
from flashgen.ops.decode_call import DecodeOptions, DecodeTensors
from flashgen.ops.decode_checks import check_contents, check_in_place, decode_extras, decode_problem
from flashgen.ops.decode_runtime import nothing_to_decode, readable_inputs, run_unseen_decode
from flashgen.ops.runtime import Outputs, choose, negated
from flashgen.spec import Extras, Problem


def decode_cpu(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions
) -> Outputs:
    """Return out, and lse where asked for, and write what is appended into the caches.

    Raises:
        InputError, ConfigError: for what a GPU call would refuse, too.
        UnsupportedError: for devices that are neither GPUs nor CPUs.
    """
    problem = decode_problem(q, k_cache, v_cache, tensors, options)
    check_in_place(k_cache, v_cache)
    config = decode_config(options.config)
    if config is not None:
        require_legal(config, problem.spec, INTERPRETED_AS)
    if q.device.type != "cpu":
        raise UnsupportedError(f"flashgen runs on CUDA and ROCm GPUs and on the CPU, not on {q.device}")
    if options.check:
        check_contents(q, k_cache, problem, tensors, options)
    if nothing_to_decode(problem):
        return run_unseen_decode(q, k_cache, v_cache, tensors, problem=problem, options=options)
    if is_interpreting():
        # As on a GPU: tensors that no kernel can read in place are copied.
        q, tensors = readable_inputs(q, tensors)
    extras = decode_extras(problem, tensors, options)
    views = {name: heads_first(t, options.layout) for name, t in (("q", q), ("k", k_cache), ("v", v_cache))}
    if is_interpreting():
        out, lse = _interpret(views, problem, extras, options)
    else:
        say_eager()
        given = views["q"], views["k"], views["v"]
        with torch.autocast("cpu", enabled=False):
            out, lse = decode_reference(*given, spec=problem.spec, extras=extras, precision="input")
        append_to_cache(views["k"], views["v"], spec=problem.spec, extras=extras)
    # An operator's outputs have the strides that its fake promises.
    out = heads_first(out, options.layout).contiguous()
    return out, lse.float().contiguous() if lse is not None and options.return_lse else None


def _interpret(
    views: dict[str, torch.Tensor], problem: Problem, extras: Extras, options: DecodeOptions
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if extras.softmax_scale < 0:
        views = {**views, "q": negated(views["q"])}
        extras = dataclasses.replace(extras, softmax_scale=-extras.softmax_scale)
    q = views["q"]
    out = q.new_empty((*q.shape[:-1], problem.spec.head_dim_v))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if problem.spec.lse else None
    tensors = {**views, "out": out, **({} if lse is None else {"lse": lse})}
    config = choose(problem, INTERPRETED_AS, options).config
    assert isinstance(config, TritonDecodeConfig)
    interpret_decode(tensors, problem=problem, config=config, extras=extras)
    return out, lse
