"""Problems as one line of text, `b=4 hq=32 hkv=8 sq=4096 sk=4096 d=128 causal bf16`: the form of the command line."""

from __future__ import annotations

from flashgen.errors import InputError
from flashgen.spec.dtypes import DType, parse_dtype
from flashgen.spec.masks import Full, Mask, parse_mask
from flashgen.spec.problem import PHASES, AttentionSpec, Problem, Shape

_NUMBERS = {
    "b": "batch",
    "h": "query and key/value heads alike",
    "hq": "query heads",
    "hkv": "key/value heads (default: hq)",
    "s": "query and key length alike",
    "sq": "query length",
    "sk": "key length (default: sq)",
    "d": "head dimension of Q and K",
    "dv": "head dimension of V (default: d)",
}


def parse_problem(text: str) -> Problem:
    """Return the problem that `text` describes, the inverse of `str(problem)`.

    Words: `b= hq= hkv= sq= sk= d= dv=` (`h=` and `s=` set both of a pair), a mask (`full`, `causal`,
    `causal(align=top_left)`), a dtype (default bf16), a phase (default forward), `lse`.

    Raises:
        InputError: for an unknown, repeated or missing word, or a size out of range.
    """
    numbers: dict[str, int] = {}
    mask: Mask | None = None
    dtype: DType | None = None
    lse = False
    for word in text.replace(",", " ").split():
        key, _, value = word.partition("=")
        if key in _NUMBERS:
            if key in numbers:
                raise InputError(f"{key}= is given twice in {text!r}")
            if not value.isdecimal():
                raise InputError(f"{word!r}: {key}= takes a whole number ({_NUMBERS[key]})")
            numbers[key] = int(value)
        elif word == "lse":
            lse = True
        elif word in PHASES:
            continue
        elif word.startswith(("full", "causal")):
            if mask is not None:
                raise InputError(f"a mask is given twice in {text!r}: {mask} and {word}")
            mask = parse_mask(word)
        else:
            if dtype is not None:
                raise InputError(f"{word!r} in {text!r}: no part of a shape, or a dtype given twice ({dtype})")
            dtype = _dtype_word(word)
    return _assemble(text, numbers, mask or Full(), dtype or DType.BF16, lse)


def _dtype_word(word: str) -> DType:
    try:
        return parse_dtype(word)
    except InputError:
        allowed = " ".join(f"{k}=" for k in _NUMBERS)
        raise InputError(
            f"{word!r} is no part of a shape; allowed: {allowed}, a mask (full, causal, causal(align=top_left)), "
            "a dtype (fp16, bf16, fp32), forward, lse"
        ) from None


def _assemble(text: str, numbers: dict[str, int], mask: Mask, dtype: DType, lse: bool) -> Problem:
    heads = numbers.get("hq", numbers.get("h"))
    seqlen = numbers.get("sq", numbers.get("s"))
    head_dim = numbers.get("d")
    if heads is None or seqlen is None or head_dim is None:
        raise InputError(f"{text!r} must give hq= (or h=), sq= (or s=) and d=; example: b=4 hq=32 hkv=8 s=4096 d=128")
    shape = Shape(
        batch=numbers.get("b", 1),
        seqlen_q=seqlen,
        seqlen_k=numbers.get("sk", numbers.get("s", seqlen)),
        nheads_q=heads,
        nheads_kv=numbers.get("hkv", numbers.get("h", heads)),
    )
    spec = AttentionSpec(dtype=dtype, head_dim_qk=head_dim, head_dim_v=numbers.get("dv", head_dim), mask=mask, lse=lse)
    return Problem(spec=spec, shape=shape)
