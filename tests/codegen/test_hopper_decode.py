"""The decode kernel for Hopper: its structures and limits, and what it shares with the forward kernel."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from flashgen.codegen import HopperDecodeConfig, argument_kind, constant_values, render
from flashgen.codegen.constraints import constraints_of, interpreter_refusal, shape_refusal
from flashgen.codegen.hopper_decode_constraints import HOPPER_DECODE_CONSTRAINTS
from flashgen.spec import AttentionSpec, parse_problem
from flashgen.target import named_target

H200 = named_target("H200")
CONFIG = HopperDecodeConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
WORDS = (
    *("d=128 causal", "d=128 full lse", "d=64 sliding_window(100,3)", "d=128 sliding_window(-1,3) page=256"),
    *("d=128 causal append", "d=96 dv=72 sliding_window(100,3) append rotary=pairs lse page=128"),
    *("d=128 full append rotary=halves batch_idx", "d=96 causal page=16 lse"),
    *("d=128 causal batch_idx", "d=192 dv=96 causal lse sinks", "d=64 causal softcap sinks alibi lse page=128"),
    *("d=80 causal score_mod('return score * 2.0 + w[h]', w='float32[h]')", "d=64 causal&chunked(100)"),
)
NUMBERS: tuple[dict[str, int | str], ...] = (
    *({}, {"consumers": 1}, {"consumers": 3}, {"queries": "registers"}, {"turns": "alternate"}, {"pack": "heads"}),
    *({"convert": "late"}, {"convert": "held"}, {"rescale": 8}, {"loops": "single"}, {"release": "named"}),
)


def spec(words: str = "d=128") -> AttentionSpec:
    return parse_problem(f"b=1 hq=8 hkv=2 sq=64 sk=4096 decode bf16 {words}").spec


def config(**numbers: int | str) -> HopperDecodeConfig:
    changed: dict[str, object] = dict(numbers)
    return dataclasses.replace(CONFIG, **changed)  # type: ignore[arg-type]


REFUSED = {
    "runs_on_hopper": (config(), spec(), "A100", "is sm_80"),
    "elements_of_16_bits": (config(), dataclasses.replace(spec("d=64"), dtype="fp32"), "H200", "not of fp32"),
    "features_known": (config(), spec("d=128 fp8_kv leftpad"), "H200", "does not know leftpad, fp8_kv"),
    "head_dims_fit_product": (config(), spec("d=576 dv=512"), "H200", "576 is more than 256"),
    "roles_within_limits": (config(num_warps=8), spec(), "H200", "num_warps=8 is not 4"),
    "numbers_within_limits": (config(num_stages=5), spec(), "H200", "num_stages=5 is not from 2 to 4"),
    "parts_have_tiles": (config(min_blocks=0), spec(), "H200", "min_blocks=0 is less than 1"),
    "block_power_of_two": (config(block_n=96), spec(), "H200", "block_n=96"),
    "pages_hold_tiles": (
        config(),
        spec("d=128 page=24"),
        "H200",
        "not from pages of 24",
    ),
    "heads_share_keys": (config(consumers=1, pack="heads"), spec(), "H200", "2 consumers or more, got 1"),
    "turns_need_others": (config(consumers=1, turns="alternate"), spec(), "H200", "2 consumers or more, got 1"),
    "single_loop_matters": (config(loops="single"), spec("d=128 full"), "H200", "same kernel as split"),
    "descriptor_alignment": (config(block_n=512), spec("d=64"), "H200", "more than the 256"),
    "product_fits_registers": (config(consumers=3, block_n=64), spec("d=256"), "H200", "needs 158 registers"),
    "shared_memory_fits": (config(num_stages=4), spec("d=128 causal"), "H200", "at least 295312 bytes"),
    "accumulators_fit_registers": (config(consumers=3, queries="registers"), spec("d=64"), "H200", "need about 168"),
}


def test_every_constraint_has_a_case() -> None:
    assert REFUSED.keys() == HOPPER_DECODE_CONSTRAINTS.keys()
    assert constraints_of("gluon/hopper_decode").predicates == HOPPER_DECODE_CONSTRAINTS


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_its_numbers(name: str) -> None:
    refused, asked, gpu, says = REFUSED[name]
    reason = HOPPER_DECODE_CONSTRAINTS[name](refused, asked, named_target(gpu))
    assert reason is not None
    assert says in reason


def test_needs_a_gpu_and_groups_that_its_heads_divide() -> None:
    assert "needs a GPU" in (interpreter_refusal(CONFIG) or "")
    shape = parse_problem("b=1 hq=9 hkv=3 sq=64 sk=64 d=64 decode").shape
    assert shape_refusal(CONFIG, shape) is None
    assert "a group of 3" in (shape_refusal(config(pack="heads"), shape) or "")


def test_structures_are_formatted_as_ruff_would(tmp_path: Path) -> None:
    digests = set()
    for words in WORDS:
        for numbers in NUMBERS:
            kernel = render(spec(words), config(**numbers))
            (tmp_path / f"kernel_{kernel.digest}.py").write_text(kernel.source)
            digests.add(kernel.digest)
    # One loop is another kernel only where some key tile needs a mask.
    assert len(digests) == len(WORDS) * len(NUMBERS) - sum("full" in words for words in WORDS)
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--no-cache", "--line-length=88", str(tmp_path)]
    for command in ([*ruff, "format", "--check", "--diff"], [*ruff, "check"]):
        result = subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr


def test_numbers_do_not_change_the_source() -> None:
    source = render(spec("d=128 causal"), CONFIG).source
    for numbers in ({"block_n": 64}, {"num_stages": 3}, {"programs": 2}, {"min_blocks": 4}):
        assert render(spec("d=128 causal"), config(**numbers)).source == source
    for words in ("d=64 causal", "d=256 causal", "d=128 dv=64 causal fp16"):
        assert render(parse_problem(f"h=1 sq=64 sk=64 decode {words}").spec, CONFIG).source == source
    pages = [render(spec(f"d=128 causal page={size}"), CONFIG).digest for size in (128, 1024)]
    smaller = [render(spec(f"d=128 causal page={size}"), CONFIG).digest for size in (16, 64)]
    assert pages[0] == pages[1] != smaller[0] == smaller[1]
    assert render(spec("d=128 causal"), CONFIG).digest not in (pages[0], smaller[0])


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_constants_and_boxes_are_those_of_the_kernel(numbers: dict[str, int | str]) -> None:
    asked = spec("d=96 dv=192 page=256 causal")
    (entry,) = render(asked, config(**numbers)).plan.entries
    constants = constant_values(asked, config(**numbers))
    assert tuple(constants) == entry.constants
    assert (constants["HEAD_DIM_V"], constants["PAGE_SIZE"], constants["ROWS"]) == (192, 256, 64)
    boxes = {name: entry.box(name, constants) for name in entry.arguments if argument_kind(name) == "descriptor"}
    rows = {"q": (1, 1, 64), "k": (1, 1, 1, 128), "v": (1, 1, 1, 128)}
    columns = {"q": (64, 32), "k": (64, 32), "v": (128, 64)}
    want = {f"{x}{suffix}_desc": (*rows[x], columns[x][i]) for x in "qkv" for i, suffix in enumerate(("", "_1"))}
    assert boxes == want
    # Caches end each sequence at its own last key.
    assert entry.ragged == {name for name in boxes if name[0] in "kv"}


def test_what_is_imported_is_used() -> None:
    for words in WORDS:
        source = render(spec(words), CONFIG).source
        for module in ("hopper", "hopper_decode"):
            imported, body = source.split(f"from flashgen.primitives.{module} import (")[1].split(")", 1)
            names = [name.strip() for name in imported.split(",") if name.strip()]
            assert names == sorted(names)
            for name in names:
                assert name in body, name


def test_only_tiles_of_keys_that_need_it_are_masked() -> None:
    def loops(words: str, **numbers: int | str) -> str:
        plan = render(spec(words), config(**numbers)).plan
        return "".join(masked[0] for masked, _ in plan.key_loops)  # type: ignore[attr-defined]

    assert [loops(f"d=128 {mask}") for mask in ("full", "causal", "sliding_window(100,0)")] == ["F", "TF", "TFT"]
    assert loops("d=128 causal", loops="single") == "j"


def test_appends_in_a_kernel_of_its_own() -> None:
    asked = spec("d=128 causal append rotary=halves page=256 lse")
    plan = render(asked, CONFIG).plan
    append, attend = plan.entries
    assert (append.name, append.language) == ("append_rows", "triton")
    assert (attend.name, attend.language) == ("attn_decode", "gluon")
    # The numbers of the Hopper kernel are no business of one that moves memory.
    assert CONFIG.launch_options("append_rows").maxnreg == 0 < CONFIG.launch_options("attn_decode").maxnreg
    # What reads the cache is the kernel of calls that append nothing, with longer sequences.
    without = render(spec("d=128 causal page=256 lse"), CONFIG)
    assert attend == without.plan.entries[0]
    functions, of_both = (kernel.source.strip().split("\n\n\n")[1:] for kernel in (without, render(asked, CONFIG)))
    assert [function for function in of_both if function in functions] == functions
    for tables, kind in (("", "bf16"), ("rotary_fp32", "fp32")):
        asked = spec(f"d=128 causal append rotary=pairs {tables}")
        types = dict(render(asked, CONFIG).plan.entries[0].pointer_types)
        assert {types[name] for name in ("rotary_cos_ptr", "rotary_sin_ptr")} == {kind}
