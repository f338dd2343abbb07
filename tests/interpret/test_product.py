"""Random calls from the whole product of features, in the interpreter; `--draws N --draw-seed S` draws others."""

from __future__ import annotations

import collections
import dataclasses
import typing

from flashgen.codegen.constraints import check_config
from flashgen.launch import Operands, readable
from flashgen.measure import poisoned_outputs
from flashgen.spec import Problem

DRAWS = 120


def test_a_drawn_call(product: typing.Any, draw_seed: int) -> None:
    drawn = product.draw(draw_seed, "cpu")
    for problem in drawn.problems:
        try:
            reason = product.run_interpreted(drawn, problem)
        except Exception as error:
            raise AssertionError(drawn.told(problem)) from error
        assert not reason, f"{reason}\n{drawn.told(problem)}"


def test_the_same_seed_draws_the_same_call(product: typing.Any) -> None:
    for seed in range(50):
        assert product.draw(seed, "cpu") == product.draw(seed, "cpu")
        assert product.draw(seed, "cuda") == product.draw(seed, "cuda")
    assert len({product.draw(seed, "cpu").spec for seed in range(50)}) == 50


def test_what_is_drawn_for_a_gpu_can_be_launched_there(product: typing.Any) -> None:
    for seed in range(150):
        drawn = product.draw(seed, "cuda")
        assert check_config(drawn.config, drawn.spec, product.TARGET) == (), drawn
        # The strides are those of any other lengths.
        small = Problem(spec=drawn.spec, shape=dataclasses.replace(drawn.shapes[0], seqlen_q=5, seqlen_k=9))
        (q, k, v), _ = product.tensors_of(drawn, small, "cpu")
        out, _ = poisoned_outputs(small, device="cpu")
        operands = Operands.of({"q": q, "k": k, "v": v, "out": out})
        assert operands.refusal(drawn.config, drawn.spec) is None, drawn
        assert all(readable(t) and t.data_ptr() % 16 == 0 for t in (q, k, v)), drawn


def test_every_feature_is_drawn(product: typing.Any) -> None:
    words: collections.Counter[str] = collections.Counter()
    for seed in range(DRAWS):
        drawn = product.draw(seed, "cpu")
        (shape,) = drawn.shapes
        spec, config = drawn.spec, drawn.config
        words.update(leaf.kind for leaf in spec.mask.leaves)
        words.update(spec.features)
        words.update([str(spec.dtype), spec.mask.kind, config.loads, config.loops, f"tiles={config.head_tiles}"])
        words.update(
            [f"group={shape.group}", f"batch={shape.batch}", "unequal" * (spec.head_dim_qk != spec.head_dim_v)]
        )
        words.update(["table" * (not spec.mask.by_formula), "captures" * bool(spec.mask.capture_count)])
        words.update(["score_mod" * (spec.score_mod is not None), "lse" * spec.lse])
        words.update(set(drawn.memory))
    values = {
        "mask": "full causal sliding_window prefix_lm chunked dilated_window global_tokens function intersection union",
        "of masks": "complement table captures",
        "dtype": "fp16 bf16 fp32 tf32 fp8",
        "config": "pointer descriptor split single tiles=1 tiles=2",
        "feature": "score_mod softcap alibi sinks dropout varlen descale lse seqused=q seqused=k seqused=qk unequal",
        "bias": "bias=input bias=fp32 bias=bool bias=input:unaligned bias=fp32:unaligned bias=bool:unaligned",
        "memory": "dense transposed sliced one-head one-entry",
        "shape": "group=1 group=2 group=3 group=6 group=7 batch=1 batch=2 batch=3",
    }
    missing = [word for many in values.values() for word in many.split() if words[word] < 2]
    assert not missing, f"hardly drawn in {DRAWS}: {missing}"
