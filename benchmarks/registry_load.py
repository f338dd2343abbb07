"""How long a registry takes to load: `python benchmarks/registry_load.py --entries 2000`.

Makes a registry file of that many entries in a temporary folder and measures, each in fresh processes: parsing its
YAML, the first load (which writes the index), later loads until the first lookup has answered, and importing flashgen
after torch. Every number is the median of the processes; no GPU is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flashgen.cli.output import print_json, print_table
from flashgen.codegen import KernelResources, TritonForwardConfig
from flashgen.registry import (
    Accuracy,
    Location,
    MeasuredRange,
    Performance,
    Provenance,
    RegistryEntry,
    RunnerUp,
    load,
    load_indexed,
    write_entries,
)
from flashgen.registry.index import index_path
from flashgen.spec import AttentionSpec, DType, Shape, masks

_MASKS = (masks.causal(), masks.full(), *(masks.sliding_window(n - 1, 0) for n in (128, 256, 512, 1024, 2048, 4096)))
_HEAD_DIMS = (64, 80, 96, 128, 192, 256)
_RUNNERS_UP = 7

_STEPS = {
    "yaml": "parse the YAML file, no index",
    "first": "first load and lookup: parse, write the index",
    "index": "load from the index and look up one spec",
    "all": "decode every entry of the index",
    "fingerprint": "load from the index, fingerprint of all entries",
    "import": "import flashgen, after torch",
    "attention": "import all that flashgen.attention needs, after torch and triton",
}


def main() -> None:
    """Run the command."""
    options = _options()
    if options.step:
        print(json.dumps(_measured(options.step, Path(options.folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (path,) = write_entries(root / "registry", itertools.islice(_entries(options.specs), options.entries))
        results = {step: _median_of_processes(step, root, options.repeat) for step in options.only or _STEPS}
        sizes = {"yaml_bytes": path.stat().st_size, "index_bytes": _index_size(root, path)}
    if options.json:
        print_json({"entries": options.entries, "specs": options.specs, **sizes, "steps": results})
        return
    title = f"{options.entries} entries of {options.specs} specs, {sizes['yaml_bytes'] / 1e6:.1f} MB of YAML"
    rows = [(_STEPS[step], f"{ms:.2f}", f"{mib:.1f}") for step, (ms, mib) in results.items()]
    print_table((title, "ms", "MiB"), rows, numeric=("ms", "MiB"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=2000)
    parser.add_argument("--specs", type=int, default=80, help="how many specs the entries are spread over")
    parser.add_argument("--repeat", type=int, default=7, help="processes to take the median of")
    parser.add_argument("--only", choices=_STEPS, action="append", help="measure this, and what else is named so")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--step", choices=_STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def _specs() -> Iterator[AttentionSpec]:
    for softcap, dtype, head_dim, mask in itertools.product(
        (False, True), (DType.BF16, DType.FP16), _HEAD_DIMS, _MASKS
    ):
        yield AttentionSpec(dtype=dtype, head_dim_qk=head_dim, head_dim_v=head_dim, mask=mask, softcap=softcap)


def _entries(n_specs: int) -> Iterator[RegistryEntry]:
    specs = list(itertools.islice(_specs(), n_specs))
    if len(specs) < n_specs:
        raise SystemExit(f"at most {len(specs)} specs")
    tiles = [
        TritonForwardConfig(block_m=m, block_n=n, num_warps=w, num_stages=s, loads="descriptor", head_group=g)
        for m, n, w, s, g in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (1, 4, 16))
    ]
    for number in itertools.count():
        spec, seqlen = specs[number % n_specs], 64 * (1 + number // n_specs)
        configs = [tiles[(7 * number + i) % len(tiles)] for i in range(1 + _RUNNERS_UP)]
        yield RegistryEntry(
            device_name="NVIDIA H200",
            arch="sm_90",
            spec=spec,
            range=MeasuredRange.of(Shape(batch=4, seqlen_q=seqlen, seqlen_k=seqlen, nheads_q=32, nheads_kv=8)),
            config=configs[0],
            origin="measured",
            resources=KernelResources(registers=168, spills=0, smem_bytes=98304),
            performance=Performance(
                median_us=1.0 + number, spread=0.01, tflops=600.0, baseline="cudnn", baseline_us=500.0, timing="cold-l2"
            ),
            accuracy=Accuracy(max_error=0.001, allowed_error=0.002),
            runners_up=tuple(RunnerUp(config=config, median_us=2.0 + number) for config in configs[1:]),
            provenance=Provenance(
                template_digest=f"{number:016x}",
                flashgen="0.1.0",
                triton="3.6.0",
                torch="2.11.0",
                driver="580.159.04",
                date="2026-11-22T07:00:00Z",
                trials=200,
                seed=0,
            ),
        )


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {"FLASHGEN_CACHE": str(root / "cache")}


def _median_of_processes(step: str, root: Path, repeat: int) -> tuple[float, float]:
    found = []
    command = [sys.executable, __file__, "--step", step, "--folder", str(root / "registry")]
    for _ in range(repeat):
        if step in ("yaml", "first"):
            shutil.rmtree(root / "cache", ignore_errors=True)
        done = subprocess.run(command, env=_environment(root), check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    ms, mib = (statistics.median(values) for values in zip(*found, strict=True))
    return ms, mib


def _index_size(root: Path, path: Path) -> int:
    os.environ |= _environment(root)
    return index_path(path).stat().st_size


def _measured(step: str, folder: Path) -> tuple[float, float]:
    """Return the milliseconds that a step took in this process, and the MiB that it left in memory."""
    wanted = next(_specs())
    (path,) = folder.glob("*.yaml")

    def look_up() -> None:
        registry = load([Location(path=folder, label="argument")])
        if not registry.candidates(wanted):
            raise SystemExit("nothing found")

    def parse() -> None:
        from flashgen.registry import read_file

        if read_file(path).issues:
            raise SystemExit("the file is not sound")

    steps: dict[str, Callable[[], object]] = {
        "yaml": parse,
        "first": look_up,
        "index": look_up,
        "all": lambda: load_indexed(path).entries(),
        "fingerprint": lambda: load([Location(path=folder, label="argument")]).fingerprint(),
    }
    if step in ("import", "attention"):
        return _import_cost(step)
    before, start = _resident_mib(), time.perf_counter()
    steps[step]()
    return 1e3 * (time.perf_counter() - start), _resident_mib() - before


def _import_cost(step: str) -> tuple[float, float]:
    # In a process of its own: this one has imported flashgen.
    first = "torch" if step == "import" else "torch, triton"
    statement = "import flashgen" if step == "import" else "import flashgen; flashgen.attention"
    script = f"""
import {first}, json, time
def mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) / 256
before, start = mib(), time.perf_counter()
{statement}
print(json.dumps((1e3 * (time.perf_counter() - start), mib() - before)))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    ms, mib = json.loads(done.stdout)
    return ms, mib


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
