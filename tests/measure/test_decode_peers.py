"""What other implementations are asked for of a decode problem, by fakes of those that are not on a CPU."""

from __future__ import annotations

import sys
import typing
from types import ModuleType

import pytest
from torch import Tensor

from flashgen.measure import DecodeCall, Oracle, append_to_cache, decode_reference, random_decode_call
from flashgen.measure.decode_peers import as_forward, through_forward
from flashgen.measure.flash_attention_peers import bind_fa3_decode
from flashgen.measure.peers import PEERS
from flashgen.measure.sdpa_peers import bind_flash
from flashgen.spec import Extras, parse_problem

SIZES = "b=2 hq=4 hkv=2 sk=50 d=64 decode"


def make_call(words: str) -> DecodeCall:
    return random_decode_call(parse_problem(f"{SIZES} {words}"), device="cpu", seed=0)


def judged(call: DecodeCall, out: Tensor) -> str:
    return Oracle(call.q, call.k, call.v, spec=call.problem.spec, extras=call.extras).judge(out, None).reason


@pytest.mark.parametrize("words", ["sq=1 causal bf16", "sq=1 fp16", "sq=4 bf16"])
def test_sdpa_reads_the_rows_in_use(words: str) -> None:
    call = make_call(words)
    attend = through_forward(bind_flash)(call)
    assert not isinstance(attend, str), attend
    assert judged(call, attend(call.q, call.k, call.v)) == ""


def test_one_causal_query_needs_no_mask() -> None:
    alone, several = (as_forward(parse_problem(f"{SIZES} sq={n} causal lse bf16")) for n in (1, 2))
    assert not isinstance(alone, str)
    assert not isinstance(several, str)
    assert (str(alone.spec.mask), str(several.spec.mask)) == ("full", "causal")
    assert alone.spec.phase == several.spec.phase == "forward"


@pytest.mark.parametrize(
    ("words", "reason"),
    [("sq=1 page=16", "page_size"), ("sq=1 append rotary=halves", "append, rotary"), ("sq=1 fp8_kv", "fp8_kv")],
)
def test_what_a_forward_cannot_say_is_refused(words: str, reason: str) -> None:
    refusal = as_forward(parse_problem(f"{SIZES} {words}"))
    assert isinstance(refusal, str)
    assert reason in refusal


def test_latent_attention_has_no_forward() -> None:
    refusal = as_forward(parse_problem("b=1 hq=16 hkv=1 sq=1 sk=64 d=576 dv=512 decode shared_kv"))
    assert isinstance(refusal, str)
    assert "512" in refusal


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_says_that_decoding_needs_a_gpu(name: str) -> None:
    answer = PEERS[name].make_decode([make_call("sq=1 bf16")])
    assert isinstance(answer, str)
    assert answer.startswith(f"{name} needs a GPU")


class FlashAttention3:
    """flash_attn_with_kvcache as FlashAttention-3 spells it, by the reference."""

    def __init__(self) -> None:
        self.options: dict[str, typing.Any] = {}

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: typing.Any) -> Tensor:
        self.options = options
        words = "causal " * options["causal"] + "append " * ("k" in options) + "leftpad " * ("cache_leftpad" in options)
        words += "batch_idx " * ("cache_batch_idx" in options)
        if "rotary_cos" in options:
            words += "rotary=pairs " if options["rotary_interleaved"] else "rotary=halves "
        if "page_table" in options:
            words += f"page={k_cache.shape[1]}"
        spec = parse_problem(f"b=1 h=1 s=8 d={q.shape[-1]} decode {words} bf16").spec
        names = ("cache_seqlens", "page_table", "cache_batch_idx", "cache_leftpad", "rotary_cos", "rotary_sin")
        extras = Extras(
            softmax_scale=options["softmax_scale"],
            k_new=options["k"].transpose(1, 2) if "k" in options else None,
            v_new=options["v"].transpose(1, 2) if "v" in options else None,
            **{name: options.get(name) for name in names},
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        out, _ = decode_reference(q, k, v, spec=spec, extras=extras, precision="input")
        append_to_cache(k, v, spec=spec, extras=extras)
        return out.transpose(1, 2)


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch) -> FlashAttention3:
    for name in ("flash_attn_interface", "flash_attn_3"):
        monkeypatch.setitem(sys.modules, name, None)
    package, module = FlashAttention3(), ModuleType("fa3_fwd_interface")
    module.flash_attn_with_kvcache = package.decode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    return package


@pytest.mark.parametrize(
    "words",
    ["causal sq=1", "causal sq=3 page=16", "sq=2 append rotary=pairs", "causal sq=2 append rotary=halves batch_idx",
     "sq=1 leftpad"],
)  # fmt: skip
def test_fa3_is_given_what_the_call_gives(fa3: FlashAttention3, words: str) -> None:
    call = make_call(f"{words} bf16")
    oracle = Oracle(call.q, call.k, call.v, spec=call.problem.spec, extras=call.extras)
    attend = bind_fa3_decode(call)
    assert not isinstance(attend, str), attend
    report = oracle.judge(attend(call.q, call.k, call.v), None)
    assert report.ok, report.reason
    assert ("page_table" in fa3.options) == ("page" in words)


@pytest.mark.parametrize("words", ["sq=1 fp8_kv bf16", "sq=1 fp32", "sq=1 sinks bf16", "sq=1 prefix_lm(3) bf16"])
def test_fa3_refuses_what_it_has_no_argument_for(fa3: FlashAttention3, words: str) -> None:
    assert isinstance(bind_fa3_decode(make_call(words)), str)
    assert fa3.options == {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash", "flex"])
@pytest.mark.parametrize("words", ["b=2 hq=8 hkv=2 sq=1 sk=1000 causal", "b=1 hq=6 hkv=2 sq=1 sk=777"])
def test_a_peer_decodes_right_on_each_copy(name: str, words: str) -> None:
    problem = parse_problem(f"{words} d=128 decode bf16")
    call = random_decode_call(problem, device="cuda", seed=0)
    runs = PEERS[name].make_decode(call.copies(2))
    assert not isinstance(runs, str), runs
    for run in runs:
        assert judged(call, run()[0]) == ""
