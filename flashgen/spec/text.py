"""Problems as one line of text, `b=4 hq=32 hkv=8 sq=4096 sk=4096 d=128 causal bf16`: the form of the command line."""

from __future__ import annotations

import collections.abc
import dataclasses
import re
import typing

from flashgen.errors import InputError
from flashgen.spec.dtypes import DType, parse_dtype
from flashgen.spec.masks import Full, Mask
from flashgen.spec.masks.text import MASK_NAMES, parse_mask
from flashgen.spec.mods import ModFunction, parse_mod
from flashgen.spec.problem import BIASES, FLAGS, PHASES, ROTARIES, AttentionSpec, Bias, Phase, Problem, Rotary, Shape

_NUMBERS = {
    "b": "batch",
    "h": "query and key/value heads alike",
    "hq": "query heads",
    "hkv": "key/value heads (default: hq)",
    "s": "query and key length alike",
    "sq": "query length (default: s; of decode with sk=, 1)",
    "sk": "key length (default: sq)",
    "d": "head dimension of Q and K",
    "dv": "head dimension of V (default: d)",
}
_BIASES: dict[str, Bias] = {name: name for name in BIASES if name != "none"}
_PHASES: dict[str, Phase] = {name: name for name in PHASES}
_ROTARIES: dict[str, Rotary] = {name: name for name in ROTARIES if name}
_VALUED = ("bias", "seqused", "page", "rotary")
FEATURE_WORDS = (
    *FLAGS, f"bias={'|'.join(_BIASES)}[:unaligned]", "seqused=q|k|qk", "page=SIZE", f"rotary={'|'.join(_ROTARIES)}"
)  # fmt: skip

# A word that is an operator, or that an operator leads or ends, belongs to its neighbours: `causal & document`.
_JOINED = re.compile(r"\s*([&|])\s*|(~)\s+")
_PARTS = re.compile(r"""(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<plain>[^'"]+)|(?P<open>['"])""", re.DOTALL)


@dataclasses.dataclass
class _Words:
    """What was read so far of one problem."""

    numbers: dict[str, int] = dataclasses.field(default_factory=dict)
    features: list[str] = dataclasses.field(default_factory=list)
    mask: Mask | None = None
    score_mod: ModFunction | None = None
    dtype: DType | None = None
    phase: Phase | None = None
    lse: bool = False


def parse_problem(text: str) -> Problem:
    """Return the problem that `text` describes, the inverse of `str(problem)`.

    Words, separated by blanks or commas: `b= hq= hkv= sq= sk= d= dv=` (`h=` and `s=` set both of a pair), a mask
    (`causal`, `sliding_window(127,0)`, `causal & document`, ...; default full), `score_mod('...')`, the words of
    `AttentionSpec.features`, a dtype (default bf16), a phase (default forward), `lse`. Blanks and commas inside
    brackets and quotes belong to their word.

    Raises:
        InputError: for an unknown, repeated or missing word, or a size out of range.
    """
    words = _Words()
    for word in split_words(text):
        _read(word, words, text)
    return _assemble(text, words)


def with_features(spec: AttentionSpec, words: collections.abc.Iterable[str]) -> AttentionSpec:
    """Return the spec with what these words say, the inverse of `AttentionSpec.features`.

    Raises:
        InputError: for an unknown or repeated word, or a feature that the spec cannot have.
    """
    given: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not _is_feature(word):
            raise InputError(f"unknown feature {word[:60]!r}; allowed: {', '.join(FEATURE_WORDS)}")
        if name in given:
            raise InputError(f"{name} is given twice")
        given[name] = value
    kind, _, alignment = given.get("bias", "").partition(":")
    if ("bias" in given and kind not in _BIASES) or alignment not in ("", "unaligned"):
        raise InputError(f"bias={given['bias'][:60]!r}: allowed are {', '.join(_BIASES)}, and :unaligned after it")
    if "seqused" in given and not given["seqused"]:
        raise InputError("seqused= takes q, k or qk")
    if given.get("rotary", "halves") not in _ROTARIES:
        raise InputError(f"rotary={given['rotary'][:60]!r}: allowed are {', '.join(_ROTARIES)}")
    page_size = given.get("page", "0")
    if not (page_size.isascii() and page_size.isdecimal()) or len(page_size) > 9 or given.get("page") == "0":
        raise InputError(f"page={page_size[:60]!r}: takes a whole number of at least 1")
    flags: dict[str, typing.Any] = {name: name in given for name in FLAGS}
    return dataclasses.replace(
        spec,
        bias=_BIASES.get(kind, "none"),
        bias_aligned=not alignment,
        seqused=given.get("seqused", ""),
        page_size=int(page_size),
        rotary=_ROTARIES.get(given.get("rotary", ""), ""),
        **flags,
    )


def split_words(text: str) -> list[str]:
    """Return the words of `text`: parts between blanks or commas that are outside of brackets and quotes.

    Raises:
        InputError: if a bracket or a quote has no partner.
    """
    words, depth = [""], 0
    for part in _PARTS.finditer(text):
        if part["open"]:
            raise InputError(f"a quote is not closed in {_shortened(text)}")
        if part["quoted"]:
            words[-1] += part["quoted"]
            continue
        for character in _JOINED.sub(r"\1\2", part["plain"]):
            depth += (character in "([{") - (character in ")]}")
            if depth < 0:
                raise InputError(f"a bracket has no partner in {_shortened(text)}")
            if depth == 0 and (character == "," or character.isspace()):
                words.append("")
            else:
                words[-1] += character
    if depth:
        raise InputError(f"a bracket has no partner in {_shortened(text)}")
    return [word for word in words if word]


def _is_feature(word: str) -> bool:
    return word in FLAGS or word.startswith(tuple(f"{name}=" for name in _VALUED))


def _is_mask(word: str) -> bool:
    return word.startswith(("~", "(")) or re.split(r"\W", word, maxsplit=1)[0] in MASK_NAMES


def _read(word: str, words: _Words, text: str) -> None:
    """Add one word of `text` to what was read."""
    key, _, value = word.partition("=")
    if key in _NUMBERS:
        if key in words.numbers:
            raise InputError(f"{key}= is given twice in {_shortened(text)}")
        if not (value.isascii() and value.isdecimal()) or len(value) > 18:
            raise InputError(f"{_shortened(word)}: {key}= takes a whole number ({_NUMBERS[key]})")
        words.numbers[key] = int(value)
    elif word == "lse":
        words.lse = True
    elif word in _PHASES:
        _refuse_second("phase", words.phase, word, text)
        words.phase = _PHASES[word]
    elif _is_feature(word):
        words.features.append(word)
    elif word.startswith("score_mod("):
        _refuse_second("score_mod", words.score_mod, word, text)
        words.score_mod = parse_mod(word)
    elif _is_mask(word):
        _refuse_second("mask", words.mask, word, text)
        words.mask = parse_mask(word)
    else:
        dtype = _dtype_word(word)
        _refuse_second("dtype", words.dtype, word, text)
        words.dtype = dtype


def _refuse_second(what: str, known: object, word: str, text: str) -> None:
    if known is not None:
        joined = "; masks are joined by & and |" if what == "mask" else ""
        raise InputError(f"a {what} is given twice in {_shortened(text)}: {known} and {word}{joined}")


def _dtype_word(word: str) -> DType:
    try:
        return parse_dtype(word)
    except InputError:
        raise InputError(
            f"{_shortened(word)} is no part of a problem; allowed: {' '.join(f'{k}=' for k in _NUMBERS)}, "
            f"a mask ({', '.join(MASK_NAMES)}, joined by &, | and ~, as in sliding_window(127,0)&document), "
            f"score_mod('...'), {', '.join(FEATURE_WORDS)}, a dtype ({', '.join(DType)}), {', '.join(PHASES)}, lse"
        ) from None


def _assemble(text: str, words: _Words) -> Problem:
    numbers = words.numbers
    heads = numbers.get("hq", numbers.get("h"))
    # A step of decoding has one query, whatever there is in the cache.
    one = 1 if words.phase == "decode" and "sk" in numbers else None
    seqlen = numbers.get("sq", numbers.get("s", one))
    head_dim = numbers.get("d")
    if heads is None or seqlen is None or head_dim is None:
        raise InputError(
            f"{_shortened(text)} must give hq= (or h=), sq= (or s=) and d=; example: b=4 hq=32 hkv=8 s=4096 d=128"
        )
    shape = Shape(
        batch=numbers.get("b", 1),
        seqlen_q=seqlen,
        seqlen_k=numbers.get("sk", numbers.get("s", seqlen)),
        nheads_q=heads,
        nheads_kv=numbers.get("hkv", numbers.get("h", heads)),
    )
    spec = AttentionSpec(
        phase=words.phase or "forward",
        dtype=words.dtype or DType.BF16,
        head_dim_qk=head_dim,
        head_dim_v=numbers.get("dv", head_dim),
        mask=words.mask or Full(),
        score_mod=words.score_mod,
        lse=words.lse,
    )
    try:
        return Problem(spec=with_features(spec, words.features), shape=shape)
    except InputError as error:
        raise InputError(f"{_shortened(text)}: {error}") from None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 300 else f"{text[:297]}...")
