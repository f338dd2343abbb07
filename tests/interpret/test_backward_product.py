"""Random calls of the backward kernels in the interpreter; `--draws N --draw-seed S` draws others."""

from __future__ import annotations

import collections
import dataclasses
import typing

from flashgen.codegen.constraints import check_config
from flashgen.measure import random_inputs
from flashgen.spec import Problem

DRAWS = 40


def test_a_drawn_call(backward_product: typing.Any, draw_seed: int) -> None:
    drawn = backward_product.draw(draw_seed, "cpu")
    for problem in drawn.problems:
        try:
            reason = backward_product.run_interpreted(drawn, problem)
        except Exception as error:
            raise AssertionError(drawn.told(problem)) from error
        assert not reason, f"{reason}\n{drawn.told(problem)}"


def test_the_same_seed_draws_the_same_call(backward_product: typing.Any) -> None:
    for seed in range(50):
        assert backward_product.draw(seed, "cpu") == backward_product.draw(seed, "cpu")
        assert backward_product.draw(seed, "cuda") == backward_product.draw(seed, "cuda")
    assert len({backward_product.draw(seed, "cpu").spec for seed in range(50)}) == 50


def test_what_is_drawn_for_a_gpu_is_legal_there(product: typing.Any, backward_product: typing.Any) -> None:
    for seed in range(150):
        drawn = backward_product.draw(seed, "cuda")
        assert check_config(drawn.config, drawn.spec, product.TARGET) == (), drawn
        small = Problem(spec=drawn.spec, shape=dataclasses.replace(drawn.shapes[0], seqlen_q=5, seqlen_k=9))
        for t, how in zip(random_inputs(small, device="cpu", seed=0), drawn.memory, strict=True):
            described = drawn.config.loads == "descriptor"
            laid_out = product.laid_out(t, how)
            assert not described or (0 not in laid_out.stride()[:-1] and laid_out.data_ptr() % 16 == 0), drawn


def test_every_feature_is_drawn(backward_product: typing.Any) -> None:
    words: collections.Counter[str] = collections.Counter()
    for seed in range(3 * DRAWS):
        drawn = backward_product.draw(seed, "cpu")
        (shape,) = drawn.shapes
        spec, config = drawn.spec, drawn.config
        assert spec.phase == "backward"
        words.update(leaf.kind for leaf in spec.mask.leaves)
        words.update(spec.features)
        words.update([str(spec.dtype), spec.mask.kind, config.loads, config.loops, f"dq={config.dq}"])
        words.update([f"group={shape.group}", "unequal" * (spec.head_dim_qk != spec.head_dim_v)])
        words.update(["table" * (not spec.mask.by_formula), "score_mod" * (spec.score_mod is not None)])
        words.update(["dlse" * drawn.dlse, "table added" * (config.dq == "atomic" and not spec.mask.by_formula)])
        words.update([f"{config.dq} {config.loads}", f"{config.dq} varlen" * spec.varlen])
        words.update(set(drawn.memory))
    values = (
        "full causal sliding_window prefix_lm chunked dilated_window function intersection union table",
        "fp16 bf16 fp32 tf32 pointer descriptor split single dq=kernel dq=atomic dq=ordered unequal dlse",
        "score_mod softcap alibi sinks dropout varlen deterministic dbias seqused=q seqused=k seqused=qk",
        "bias=input bias=fp32 bias=bool dense transposed sliced one-head group=1 group=3 group=6",
    )
    pairs = [f"{dq} {how}" for dq in ("kernel", "atomic") for how in ("pointer", "descriptor", "varlen")]
    missing = [word for word in [*" ".join(values).split(), *pairs, "table added"] if words[word] < 2]
    assert not missing, f"hardly drawn in {3 * DRAWS}: {missing}"
    assert words["ordered pointer"] >= 2
