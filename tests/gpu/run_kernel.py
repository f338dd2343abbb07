"""Compile and run one kernel on a small problem, for sanitizers: prints `right`, or what is wrong.

    python run_kernel.py PROBLEM CONFIG [DROPPED]

CONFIG is JSON. DROPPED is text that is taken out of the rendered source, wherever it stands: a planted race.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch
import triton

from flashgen.codegen import code_digest, config_from_dict, render
from flashgen.compile import compile_kernel
from flashgen.launch import bind_forward, detect_target
from flashgen.spec import parse_problem
from flashgen.tuning.gpu_cases import make_case


def main(text: str, numbers: str, dropped: str = "") -> None:
    """Run it once; see the module."""
    problem, config = parse_problem(text), config_from_dict(json.loads(numbers))
    device = torch.device("cuda", torch.cuda.current_device())
    rendered = render(problem.spec, config)
    if dropped:
        assert dropped in rendered.source
        source = rendered.source.replace(dropped, "pass")
        rendered = dataclasses.replace(rendered, source=source, digest=code_digest(source))
    compiled = compile_kernel(rendered, problem.spec.structure(), config, detect_target(device))
    # What a sanitizer of the compiler keeps beside the kernel's own memory.
    scratch = compiled.entries[0].handle.metadata.global_scratch_size
    print(f"instrumented {scratch > 0}", flush=True)
    triton.set_allocator(lambda size, alignment, stream: torch.zeros(size, dtype=torch.int8, device=device))
    case = make_case(problem, device=device, seed=0, whole=True)
    bind_forward(problem, config, compiled, case.extras, case.tensors)()
    torch.cuda.synchronize()
    report = case.judge()
    print("right" if report.ok else report.reason, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
