"""Bugs planted into real kernels: each is refused by what the tuner runs of a candidate, and no right kernel is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from backward_mutants import ATOMIC, BACKWARD_MUTANTS, OWN_DQ
from decode_mutants import CONFIG as DECODE
from decode_mutants import DECODE_MUTANTS, TEAMS
from forward_mutants import CONFIG, FORWARD_MUTANTS
from interpreted_jobs import without_a_gpu
from mutants import outcome_of, planted

from flashgen.codegen import KernelConfig, TritonBackwardConfig, TritonDecodeConfig, TritonForwardConfig
from flashgen.spec import parse_problem
from flashgen.tuning import gpu_jobs

MUTANTS = {
    **FORWARD_MUTANTS,
    **{f"gradients: {name}": mutant for name, mutant in BACKWARD_MUTANTS.items()},
    **{f"decoding: {name}": mutant for name, mutant in DECODE_MUTANTS.items()},
}

SINGLE = TritonForwardConfig(block_m=32, block_n=16, num_warps=1, num_stages=1, loops="single", head_group=2)
COPIED = TritonForwardConfig(block_m=16, block_n=32, num_warps=1, num_stages=1, loads="descriptor", head_tiles=2)
ORDERED = TritonBackwardConfig(block_m1=16, block_n1=32, num_warps=1, num_stages=1, dq="ordered", loops="single")
COPIED_DQ = TritonBackwardConfig(block_m1=32, block_n1=32, num_warps=1, num_stages=1, dq="atomic", loads="descriptor")
WIDE = TritonDecodeConfig(block_m=16, block_n=32, num_warps=1, num_stages=1, loops="single", head_tiles=2)

RIGHT: tuple[tuple[KernelConfig, str], ...] = (
    (CONFIG, "hq=2 hkv=1 causal fp16"),
    (CONFIG, "hq=1 hkv=1 full fp32 seqused=qk"),
    (CONFIG, "hq=1 hkv=1 sliding_window(9,3) sinks varlen fp16"),
    (CONFIG, "hq=1 hkv=1 chunked(8) bias=input:unaligned dropout fp16"),
    (CONFIG, "hq=1 hkv=1 causal&document fp16"),
    (SINGLE, "hq=1 hkv=1 causal softcap alibi fp16"),
    (SINGLE, "hq=1 hkv=1 dilated_window(3,3,2) bias=bool fp16"),
    (COPIED, "hq=1 hkv=1 prefix_lm(5) d=48 fp16"),
    (COPIED, "hq=1 hkv=1 full score_mod('return score * 0.5') fp16"),
    (OWN_DQ, "hq=1 hkv=1 causal fp16 backward"),
    (OWN_DQ, "hq=1 hkv=1 sliding_window(9,3) varlen fp16 backward"),
    (ATOMIC, "hq=2 hkv=1 full softcap dropout fp16 backward"),
    (ATOMIC, "hq=1 hkv=1 causal bias=input fp16 backward"),
    (ORDERED, "hq=1 hkv=1 prefix_lm(5) alibi deterministic fp32 backward"),
    (COPIED_DQ, "hq=1 hkv=1 causal d=48 fp16 backward"),
    (DECODE, "hq=1 hkv=1 sq=1 full append rotary=halves leftpad fp16 decode"),
    (TEAMS, "hq=2 hkv=1 sq=2 causal page=16 lse fp16 decode"),
    (WIDE, "hq=2 hkv=1 sq=3 sliding_window(9,0) shared_kv d=48 dv=32 fp16 decode"),
)

# Bugs divide by zero, and right kernels take the logarithm of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with without_a_gpu():
        yield


@pytest.mark.parametrize("name", MUTANTS)
def test_a_bug_is_refused_by_the_tuners_own_checks(name: str) -> None:
    mutant = MUTANTS[name]
    with planted(mutant):
        refused = outcome_of(mutant.parsed(), mutant.config)
    assert refused is not None, "it would be tuned"
    assert refused.stage == "accuracy", refused
    assert re.search(mutant.says, refused.reason), refused


@pytest.mark.parametrize(("config", "words"), RIGHT, ids=[f"{config.template} {words}" for config, words in RIGHT])
def test_what_is_right_is_never_refused(config: KernelConfig, words: str) -> None:
    size = "" if " d=" in words else " d=16"
    assert outcome_of(parse_problem(f"b=2 s=40{size} {words}"), config) is None


def test_a_bug_that_finds_nothing_to_change_is_an_error() -> None:
    gone = FORWARD_MUTANTS["causal, without the diagonal"]
    with pytest.raises(AssertionError, match="nothing to replace"), planted(gone):
        gpu_jobs.render(parse_problem("b=2 hq=1 hkv=1 s=16 d=16 full fp16").spec, CONFIG)
