"""What the adapters ask other implementations for, by fakes of those on the CPU."""

from __future__ import annotations

import sys
import typing
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from flashgen.measure import AccuracyReport, accuracy_error, attention_reference, random_extras, random_inputs
from flashgen.measure.autograd_calls import Attend
from flashgen.measure.flash_attention_peers import bind_fa3, bind_fa4
from flashgen.measure.flex_peer import bind_flex
from flashgen.measure.peer import Bind
from flashgen.measure.sdpa_peers import bind_cudnn, bind_efficient, bind_flash
from flashgen.spec import Extras, Problem, parse_problem

CPU = torch.device("cpu")
FA3_MODULES = ("flash_attn_interface", "flash_attn_3", "fa3_fwd_interface")


def judged(bind: Bind, text: str) -> AccuracyReport:
    problem = parse_problem(text)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    attend = bind(problem, extras, CPU)
    assert not isinstance(attend, str), attend
    return accuracy_error(attend(q, k, v), None, q, k, v, spec=problem.spec, extras=extras)


def bound(bind: Bind, text: str) -> Attend | str:
    problem = parse_problem(text)
    return bind(problem, random_extras(problem, device="cpu", seed=0), CPU)


class FlashAttention:
    """A package for [..., seqlen, heads, head_dim] that computes the reference, and keeps the last call's options."""

    def __init__(self, open_side: int | None) -> None:
        self.open_side = open_side
        self.options: dict[str, typing.Any] = {}

    def module(self, name: str) -> ModuleType:
        module = ModuleType(name)
        module.flash_attn_func = self.dense  # type: ignore[attr-defined]
        module.flash_attn_varlen_func = self.packed  # type: ignore[attr-defined]
        return module

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **options: typing.Any) -> Tensor:
        out = self._computed(*(x.transpose(1, 2) for x in (q, k, v)), words="", **options)
        return out.transpose(1, 2)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, **options: typing.Any) -> tuple[Tensor, None]:
        return self._computed(q, k, v, words="varlen", **options), None

    def _computed(self, q: Tensor, k: Tensor, v: Tensor, *, words: str, **options: typing.Any) -> Tensor:
        self.options = options
        left, right = (-1 if side is self.open_side else side for side in options["window_size"])
        mask = "causal" if options["causal"] else "full" if left == right == -1 else f"sliding_window({left},{right})"
        words += " softcap" * ("softcap" in options) + " sinks" * ("learnable_sink" in options)
        words += " descale" * ("q_descale" in options)
        dtype = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}[q.dtype]
        # Sizes play no part in a spec.
        problem = parse_problem(f"b=1 h=1 s=8 d={q.shape[-1]} dv={v.shape[-1]} {mask} {words} {dtype}")
        extras = Extras(
            softmax_scale=options["softmax_scale"],
            softcap=options.get("softcap", 0.0),
            sinks=options.get("learnable_sink"),
            cu_seqlens_q=options.get("cu_seqlens_q"),
            cu_seqlens_k=options.get("cu_seqlens_k"),
            q_descale=options.get("q_descale"),
            k_descale=options.get("k_descale"),
            v_descale=options.get("v_descale"),
        )
        return attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="input")[0]


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    for name in FA3_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    package = FlashAttention(open_side=-1)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", package.module("fa3_fwd_interface"))
    return package


@pytest.fixture
def fa4(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    package = FlashAttention(open_side=None)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package.module("flash_attn.cute"))
    return package


BOTH = (
    "b=2 hq=4 hkv=2 s=40 d=32 causal bf16",
    "b=1 h=2 sq=24 sk=40 d=64 full bf16",
    "b=1 h=2 sq=24 sk=40 d=32 sliding_window(7,0) bf16",
    "b=1 h=2 s=40 d=32 sliding_window(-1,3) bf16",
    "b=1 h=2 s=40 d=192 dv=128 causal bf16",
    "b=1 h=2 s=40 d=32 causal softcap bf16",
    "b=3 hq=4 hkv=2 s=40 d=32 causal varlen bf16",
)


@pytest.mark.parametrize("text", [*BOTH, "b=2 h=2 s=40 d=32 full fp8", "b=2 hq=4 hkv=2 s=40 d=32 causal descale fp8"])
def test_flash_attention_3_is_asked_for_the_problem(fa3: FlashAttention, text: str) -> None:
    report = judged(bind_fa3, text)
    assert report.ok, report.reason
    assert "deterministic" not in fa3.options
    if "varlen" in text:
        assert (fa3.options["max_seqlen_q"], fa3.options["max_seqlen_k"]) == (40, 40)


@pytest.mark.parametrize("text", [*BOTH, "b=1 h=2 s=40 d=32 causal sinks bf16"])
def test_flash_attention_4_is_asked_for_the_problem(fa4: FlashAttention, text: str) -> None:
    report = judged(bind_fa4, text)
    assert report.ok, report.reason


def test_deterministic_gradients_are_asked_for(fa3: FlashAttention) -> None:
    text = "b=1 h=2 s=40 d=32 causal bf16 backward deterministic"
    attend = bound(bind_fa3, text)
    assert not isinstance(attend, str)
    attend(*random_inputs(parse_problem(text), device="cpu", seed=0))
    assert fa3.options["deterministic"] is True


@pytest.mark.usefixtures("fa3", "fa4")
@pytest.mark.parametrize(
    ("bind", "text", "reason"),
    [
        (bind_fa3, "b=1 h=2 s=16 d=32 causal sinks alibi bf16", "no adapter for alibi, sinks"),
        (bind_fa3, "b=1 h=2 s=16 d=32 causal fp32", "no adapter for fp32"),
        (bind_fa4, "b=1 h=2 s=16 d=32 causal fp8", "no adapter for fp8"),
        (bind_fa3, "b=1 h=2 s=16 d=32 prefix_lm(4) bf16", "has no mask prefix_lm(4)"),
        (bind_fa4, "b=1 h=2 sq=16 sk=32 d=32 causal(align=top_left) bf16", "cannot align causal to the top left"),
        (
            bind_fa3,
            "b=1 h=2 s=16 d=32 full score_mod('return score * 2.0') bf16",
            "no adapter for score_mod",
        ),
    ],
)
def test_what_flash_attention_has_no_argument_for_is_refused(bind: Bind, text: str, reason: str) -> None:
    assert bound(bind, text) == reason


TEXT = "b=1 h=2 s=16 d=32 causal bf16"


def test_a_package_that_is_not_there_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr("flashgen.measure.flash_attention_peers.importlib.import_module", absent)
    looked = "is not installed (looked for flash_attn_interface, flash_attn_3.flash_attn_interface, fa3_fwd_interface)"
    assert bound(bind_fa3, TEXT) == looked
    assert bound(bind_fa4, TEXT) == "is not installed (looked for flash_attn.cute)"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("libcudart.so.12: cannot open shared object file"), "ImportError: libcudart.so.12: cannot open"),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "No module named 'einops'"),
        (RuntimeError("undefined symbol: aoti_torch_x\nmore"), "RuntimeError: undefined symbol: aoti_torch_x)"),
        (AttributeError(), "AttributeError"),
    ],
)
def test_a_broken_package_gives_its_reason(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise error if name == "fa3_fwd_interface" else ModuleNotFoundError("gone", name=name)

    monkeypatch.setattr("flashgen.measure.flash_attention_peers.importlib.import_module", broken)
    answer = bound(bind_fa3, TEXT)
    assert isinstance(answer, str)
    assert answer.startswith("is installed but cannot be used (fa3_fwd_interface: ")
    assert told in answer


def test_a_broken_build_does_not_hide_another(fa3: FlashAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    assert judged(bind_fa3, TEXT).ok
    assert fa3.options["causal"] is True


@pytest.mark.parametrize("text", [text for text in BOTH if "sliding" in text or "varlen" in text])
def test_windows_and_packed_sequences_go_to_the_flash_op(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = FlashAttention(open_side=-1)

    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, None]:
        assert (max_q, max_k) == (parse_problem(text).shape.seqlen_q, parse_problem(text).shape.seqlen_k)
        assert dropout_p == 0
        assert not return_debug_mask
        window = (window_size_left, window_size_right)
        options = {"softmax_scale": scale, "causal": is_causal, "window_size": window}
        if cu_seqlens_q is None:
            return package.dense(q, k, v, **options), None
        return package.packed(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op, raising=False)
    report = judged(bind_flash, text)
    assert report.ok, report.reason


@pytest.mark.parametrize(("words", "needs_lse"), [("", False), ("lse", True)])
def test_packed_sequences_go_to_the_op_of_cudnn(words: str, needs_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    package = FlashAttention(open_side=-1)
    asked = SimpleNamespace(lse=None)

    def op(q: Tensor, k: Tensor, v: Tensor, bias: None, *rest: typing.Any, scale: float) -> tuple[Tensor, None]:
        cu_seqlens_q, cu_seqlens_k, max_q, max_k, asked.lse, dropout_p, is_causal = rest
        assert (bias, max_q, max_k, dropout_p) == (None, 40, 40, 0.0)
        return package.packed(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=is_causal,
            window_size=(-1, -1),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )

    monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", op, raising=False)
    report = judged(bind_cudnn, f"b=3 hq=4 hkv=2 s=40 d=32 causal varlen bf16 {words}")
    assert report.ok, report.reason
    assert asked.lse is needs_lse


@pytest.mark.parametrize(
    ("bind", "text", "reason"),
    [
        (bind_cudnn, "b=1 h=2 s=16 d=32 sliding_window(3,0) bf16", "has no mask sliding_window(3,0)"),
        (bind_cudnn, "b=1 h=2 s=16 d=32 sliding_window(3,0) varlen bf16", "has no mask sliding_window(3,0)"),
        (bind_cudnn, "b=1 h=2 sq=16 sk=32 d=32 causal varlen bf16", "differ in length"),
        (bind_efficient, "b=1 h=2 s=16 d=32 causal varlen bf16", "no adapter for varlen"),
        (bind_flash, "b=1 h=2 s=16 d=32 causal softcap bf16", "no adapter for softcap"),
        (bind_flash, "b=1 h=2 s=16 d=32 sliding_window(3,0) fp32", "no adapter for fp32"),
    ],
)
def test_what_pytorch_has_no_argument_for_is_refused(bind: Bind, text: str, reason: str) -> None:
    answer = bound(bind, text)
    assert isinstance(answer, str)
    assert reason in answer


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run FlexAttention as it is: compiling takes minutes on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "text",
    [
        "b=1 hq=4 hkv=2 sq=24 sk=40 d=32 sliding_window(7,0) fp32",
        "b=2 hq=4 hkv=2 s=40 d=32 sliding_window(7,0) sinks fp32",
        "b=3 hq=4 hkv=2 s=40 d=32 full varlen fp32",
        "b=3 hq=4 hkv=2 s=40 d=32 causal varlen softcap alibi fp32",
        "b=3 h=2 s=40 d=32 sliding_window(7,0) varlen sinks fp32",
    ],
)
def test_flex_computes_sinks_and_packed_sequences(text: str) -> None:
    report = judged(bind_flex, text)
    assert report.ok, report.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("b=2 h=2 s=16 d=32 prefix_lm(4) varlen bf16", "under mask prefix_lm(4)"),
        ("b=2 h=2 sq=16 sk=32 d=32 causal varlen bf16", "differ in length"),
        ("b=2 h=2 s=16 d=32 causal dropout bf16", "no adapter for"),
    ],
)
def test_what_flex_has_no_adapter_for_is_refused(text: str, reason: str) -> None:
    answer = bound(bind_flex, text)
    assert isinstance(answer, str)
    assert reason in answer


def test_flex_refuses_slopes_per_sequence() -> None:
    problem: Problem = parse_problem("b=2 h=2 s=16 d=32 causal varlen alibi bf16")
    answer = bind_flex(problem, random_extras(problem, device="cpu", seed=1), CPU)
    assert isinstance(answer, str)
    assert "alibi_slopes per sequence" in answer
