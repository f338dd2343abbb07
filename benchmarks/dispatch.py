"""What flashgen adds to a kernel on the host: `python benchmarks/dispatch.py`.

Two questions. What a call costs that is like an earlier one: all of it, the raw launch of its compiled kernel beside
it, and finding the kernel again. And what the first call of a process costs, imports aside, for a shape that the
shipped registry knows: with empty caches, with Triton's alone, and with all that an earlier process left.

Without a GPU the kernels are those of `--target`, and what needs one is left out: launches, and loading the binary. A
`--shape` of decoding asks the same of `flashgen.attention_with_kvcache`, on a GPU alone, and calls others beside it.
Nothing is tuned and nothing is asserted. First calls are medians of fresh processes, calls of batches in one process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import typing
from collections.abc import Callable
from pathlib import Path

import torch

import flashgen
from flashgen.cli.output import note, print_json, print_table
from flashgen.codegen import render
from flashgen.compile import compile_kernel, compiler
from flashgen.dispatch import Selection
from flashgen.launch import allocate_outputs, bind_decode, bind_forward
from flashgen.launch.kernel import BoundKernel
from flashgen.measure import host_time_us, random_decode_call, random_inputs
from flashgen.measure.peers import CUDNN, FA3, FLASH
from flashgen.ops import decode_runtime, functional, runtime
from flashgen.ops.call import Options
from flashgen.spec import Extras, Problem, parse_problem
from flashgen.target import named_target

SHAPE = "b=4 hq=32 hkv=8 s=4096 d=128 causal bf16"
Figures = dict[str, float]
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_BESIDE = (CUDNN, FLASH, FA3)
_CALLS = {
    "call": "flashgen's function, like an earlier call, no gradients",
    "raw": "raw launch of the same compiled kernel",
    "over": "the call over its raw launch",
    "allocate": "of a call, memory for out",
    "before": "of a call, all until its kernel is launched, memory aside",
    "find": "of a call, finding the kernel again",
    "new": "choosing a kernel for a kind of call that is new",
    "empty": "to compare machines by: torch.empty(4) on the CPU",
    **{peer.name: f"beside decoding: {peer.name}" for peer in _BESIDE},
}
_FIRST = {
    "cold": "caches empty: render, compile, write",
    "triton": "Triton's cache alone",
    "warm": "caches of an earlier process",
}
_PARTS = ("total", "choose", "render", "binary", "launch")


def main() -> None:
    """Run the command."""
    options = _options()
    if options.step:
        print(json.dumps(_calls(options) if options.step == "calls" else _first_call(options)))
        return
    with tempfile.TemporaryDirectory() as name:
        results = _measured(options, Path(name))
    if options.json:
        print_json({"shape": options.shape, **results})
        return
    title = f"{options.shape}, {results['device']}"
    if results["calls"]:
        rows = [(_CALLS[name], f"{us:.2f}") for name, us in results["calls"].items()]
        print_table((title, "us"), rows, numeric=("us",))
    if results["first"]:
        headers = (f"{title}: first call, ms", *_PARTS)
        cells = [
            (_FIRST[name], *(f"{parts[part]:.1f}" if part in parts else "" for part in _PARTS))
            for name, parts in results["first"].items()
        ]
        print_table(headers, cells, numeric=_PARTS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape_help = f"a dense problem of Q, K, V and a mask, or one of decoding; default: {SHAPE}"
    parser.add_argument("--shape", default=SHAPE, help=shape_help)
    parser.add_argument("--target", default="H200", help="whose kernels, where no GPU is")
    parser.add_argument("--repeat", type=int, default=3, help="processes to take the median of")
    parser.add_argument("--only", choices=("calls", "first"), help="answer one of the two questions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--step", choices=("calls", "first"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(options: argparse.Namespace, root: Path) -> dict[str, typing.Any]:
    caches = {"FLASHGEN_CACHE": root / "flashgen", "TRITON_CACHE_DIR": root / "triton"}
    step = functools.partial(_in_process, options, {name: str(path) for name, path in caches.items()})
    first: dict[str, Figures] = {}
    if options.only != "calls":
        first["cold"] = step("first")
        runs = []
        for _ in range(options.repeat):
            shutil.rmtree(caches["FLASHGEN_CACHE"])
            runs.append(step("first"))
        first["triton"] = _medians(runs)
        first["warm"] = _medians([step("first") for _ in range(options.repeat)])
    calls = {} if options.only == "first" else step("calls")
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, for {named_target(options.target)}"
    )
    return {"device": device, "calls": calls, "first": first}


def _in_process(options: argparse.Namespace, caches: dict[str, str], step: str) -> Figures:
    command = [sys.executable, __file__, "--step", step, "--shape", options.shape, "--target", options.target]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    # Which of the others cannot run the problem, and why.
    print(done.stderr, end="", file=sys.stderr)
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def _medians(runs: list[Figures]) -> Figures:
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


class _Stopwatch:
    """Adds up the time inside functions, by name; what runs inside another of them counts for itself alone."""

    def __init__(self) -> None:
        self.ms: Figures = {}
        self._inside = 0.0

    def around(self, name: str, function: Callable[..., typing.Any]) -> Callable[..., typing.Any]:
        @functools.wraps(function)
        def timed(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            outer, self._inside = self._inside, 0.0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = 1e3 * (time.perf_counter() - start)
                self.ms[name] = self.ms.get(name, 0.0) + spent - self._inside
                self._inside = outer + spent

        return timed


def _first_call(options: argparse.Namespace) -> Figures:
    """Return the milliseconds of this process's first call, in all and by part."""
    # The package's attribute of that name is the function.
    rendering = sys.modules["flashgen.codegen.render"]
    watch = _Stopwatch()
    for owner, name, part in (
        (rendering, "_render", "render"),
        (compiler, "_built", "binary"),
        (runtime, "choose", "choose"),
        (decode_runtime, "choose", "choose"),
        (BoundKernel, "__call__", "launch"),
    ):
        setattr(owner, name, watch.around(part, getattr(owner, name)))
    first = _a_call(options) if torch.cuda.is_available() else _a_choice(options)
    start = time.perf_counter()
    first()
    return {"total": 1e3 * (time.perf_counter() - start), **watch.ms}


def _inputs(options: argparse.Namespace, device: str) -> tuple[Problem, Given]:
    problem = parse_problem(options.shape)
    spec = problem.spec
    if spec.features or spec.score_mod or spec.varlen or spec.mask.capture_count or spec.phase != "forward":
        raise SystemExit(f"--shape must be a forward pass of Q, K, V and a mask without tensors, got {problem}")
    if device == "meta":
        dtype, shape = getattr(torch, spec.dtype.torch_name), problem.shape
        sizes = (
            (shape.nheads_q, shape.seqlen_q, spec.head_dim_qk),
            (shape.nheads_kv, shape.seqlen_k, spec.head_dim_qk),
            (shape.nheads_kv, shape.seqlen_k, spec.head_dim_v),
        )
        q, k, v = (torch.empty(shape.batch, *size, dtype=dtype, device="meta") for size in sizes)
        return problem, (q, k, v)
    return problem, random_inputs(problem, device=device, seed=0)


def _a_call(options: argparse.Namespace) -> Callable[[], object]:
    problem = parse_problem(options.shape)
    if problem.spec.phase == "decode":
        attend = _Decoding(problem).call
    else:
        _, (q, k, v) = _inputs(options, "cuda")
        attend = functools.partial(flashgen.attention, q, k, v, mask=problem.spec.mask)
    torch.cuda.synchronize()

    def call() -> None:
        with torch.no_grad():
            attend()
        torch.cuda.synchronize()

    return call


def _a_choice(options: argparse.Namespace) -> Callable[[], object]:
    problem, (q, k, v) = _inputs(options, "meta")
    asked = Options.of(problem, Extras(softmax_scale=problem.spec.default_scale))
    target = named_target(options.target)
    return lambda: runtime.choose(problem, target, asked, runtime.operands_of(q, k, v, problem, "bhsd"))


def _calls(options: argparse.Namespace) -> Figures:
    """Return the microseconds of calls like earlier ones, and of their parts."""
    problem = parse_problem(options.shape)
    with torch.no_grad():
        if problem.spec.phase == "decode":
            found = _Decoding(problem).figures()
        elif torch.cuda.is_available():
            found = _gpu_calls(options)
        else:
            found = _host_parts(options, *_small_inputs(options))
    return {name: found[name] for name in _CALLS if name in found}


def _small_inputs(options: argparse.Namespace) -> tuple[Problem, Given]:
    problem, given = _inputs(options, "meta")
    # As many dimensions, and next to no memory: nothing is computed.
    q, k, v = (torch.empty(1, 1, 1, t.shape[-1], dtype=t.dtype) for t in given)
    return problem, (q, k, v)


def _host_parts(options: argparse.Namespace, problem: Problem, given: Given) -> Figures:
    """Return what comes before a launch; the tensors are of any device, as no kernel is run."""
    mask = str(problem.spec.mask)
    # A plain causal mask as most callers ask for it; others as values.
    asked: dict[str, typing.Any] = {"causal": mask == "causal"}
    if mask not in ("causal", "full"):
        asked["mask"] = problem.spec.mask
    key = (mask, None, "bhsd", False, False, None, None)
    known, nothing = functional._recent, (given[0], None)
    kept, known._kinds = known._kinds, {}
    known.keep(given, key, lambda *call: nothing)
    figures = {
        "before": _fastest_us(lambda: flashgen.attention(*given, **asked)),
        "find": _fastest_us(lambda: known.find(given, key)),
        "empty": _fastest_us(lambda: torch.empty(4)),
    }
    known._kinds = kept
    choice = _a_choice(options)
    choice()
    return figures | {"new": _fastest_us(choice, number=20)}


def _fastest_us(call: Callable[[], object], number: int = 2000) -> float:
    call()
    return 1e6 * min(timeit.repeat(call, number=number, repeat=7)) / number


def _gpu_calls(options: argparse.Namespace) -> Figures:
    """Return the same with what launches: the median of batches, each started on an idle device."""
    problem, (q, k, v) = _inputs(options, "cuda")
    spec, mask = problem.spec, problem.spec.mask
    asked: dict[str, typing.Any] = {"causal": True} if str(mask) == "causal" else {"mask": mask}
    selection = flashgen.explain(q, k, v, **asked)
    compiled = compile_kernel(render(spec, selection.config), spec, selection.config, selection.target)
    out = allocate_outputs(q, spec)[0]
    tensors = {"q": q, "k": k, "v": v, "out": out}
    raw = bind_forward(problem, selection.config, compiled, Extras(softmax_scale=spec.default_scale), tensors)
    allocate = runtime.NewTensor(out.shape, out.dtype)
    called: dict[str, Callable[[], object]] = {
        "call": lambda: flashgen.attention(q, k, v, **asked),
        "raw": raw,
        "allocate": lambda: allocate(q),
    }
    figures = _in_turns(called)
    figures |= _host_parts(options, problem, (q, k, v))
    figures["new"] = host_time_us(lambda: flashgen.explain(q, k, v, **asked), repeats=20)
    return figures


def _in_turns(called: dict[str, Callable[[], object]]) -> Figures:
    """Return the host time of each call, and of `call` over `raw`."""
    # In turns, as the clock of the host wanders; three calls, and all that is to be kept is.
    rounds: list[Figures] = []
    for call in called.values():
        for _ in range(5):
            call()
    for _ in range(5):
        rounds.append({name: host_time_us(call) for name, call in called.items()})
    over = statistics.median(each["call"] - each["raw"] for each in rounds)
    return _medians(rounds) | {"over": over}


class _Decoding:
    """One call of a decode problem, over caches of as many rows as its sequences have keys."""

    def __init__(self, problem: Problem) -> None:
        if not torch.cuda.is_available():
            raise SystemExit(f"decoding is measured on a GPU alone, and here is none: got {problem}")
        self._given = given = random_decode_call(problem, device="cuda", seed=0, layout="bshd")
        names = ("cache_seqlens", "page_table", "cache_batch_idx", "cache_leftpad", "rotary_cos", "rotary_sin")
        more = ("alibi_slopes", "sinks", "k_descale", "v_descale", "softmax_scale", "softcap")
        self._asked: dict[str, typing.Any] = {name: getattr(given.extras, name) for name in (*names, *more)}
        self._asked |= {"k": given.extras.k_new, "v": given.extras.v_new, "mask": problem.spec.mask, "layout": "bhsd"}
        self._asked["rotary_interleaved"] = problem.spec.rotary == "pairs"

    def call(self) -> object:
        """Call flashgen's function."""
        return flashgen.attention_with_kvcache(self._given.q, self._given.k, self._given.v, **self._asked)

    def explain(self) -> Selection:
        """Return which kernel that is."""
        return flashgen.explain_with_kvcache(self._given.q, self._given.k, self._given.v, **self._asked)

    def figures(self) -> Figures:
        """Return the microseconds of calls like earlier ones: flashgen's, its kernel's launch alone, and others."""
        selection, given = self.explain(), self._given
        problem, config = selection.problem, selection.config
        compiled = compile_kernel(render(problem.spec, config), problem.spec, config, selection.target)
        allocate = runtime.NewTensor((*given.q.shape[:-1], problem.spec.head_dim_v), given.q.dtype)
        tensors = {"q": given.q, "k": given.k, "v": given.v, "out": allocate(given.q)}
        called: dict[str, Callable[[], object]] = {
            "call": self.call,
            "raw": bind_decode(problem, config, compiled, given.extras, tensors),
            "allocate": lambda: allocate(given.q),
        }
        for peer in _BESIDE:
            made = peer.make_decode((given,))
            if isinstance(made, str):
                note(made)
            else:
                (called[peer.name],) = made
        figures = _in_turns(called) | {"empty": _fastest_us(lambda: torch.empty(4))}
        return figures | {"new": host_time_us(self.explain, repeats=20)}


if __name__ == "__main__":
    main()
