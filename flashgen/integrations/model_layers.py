"""What the keys of a Hugging Face `config.json` say about a model's attention layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flashgen.errors import InputError
from flashgen.spec import AttentionSpec, Causal, DType, Mask, causal, full, parse_dtype
from flashgen.spec.masks import chunked, sliding_window

# One idea under the names that model families gave it.
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_query_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_WINDOW = ("sliding_window", "attention_window_size")

# What the model class fills in where published files leave it out.
_DEFAULTS: dict[str, Mapping[str, object]] = {
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window_pattern": 6,
    },
    "llama4_text": {"no_rope_layer_interval": 4},
}

# Models whose attention looks both ways, unless the file says `is_decoder`.
_ENCODERS = frozenset(
    {
        *("albert", "bert", "camembert", "distilbert", "electra", "ernie", "esm", "eurobert", "nomic_bert"),
        *("roberta", "roformer", "xlm-roberta", "siglip_text_model"),
        *("vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model", "hubert", "wav2vec2"),
    }
)

# Families whose attention has something that no key of the file tells.
_ALIBI = frozenset({"bloom"})
_SINKS = frozenset({"gpt_oss"})
_UNUSUAL: dict[str, str] = {
    "big_bird": "block-sparse attention",
    "deberta": "disentangled attention",
    "deberta-v2": "disentangled attention",
    "longformer": "windowed attention with global tokens",
    "modernbert": "alternating local attention",
    "mpnet": "relative position bias",
}

_MAX_LAYERS = 4096
_ATTENTION_KINDS = frozenset({"full_attention", "attention", "sliding_attention", "chunked_attention"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One kind of attention layer.

    Attributes:
        name: what people are told, for example `sliding-window layers (window 4096)`.
        nheads_q: query heads.
        nheads_kv: key/value heads.
        head_dim_qk: columns of Q and K.
        head_dim_v: columns of V.
        latent: head dimensions of the one row of the cache that all heads of latent attention decode from, as K and as
            V; None for other attention.
        base: full or causal, what is seen in a sequence that is no longer than `span`.
        window: what of it is seen in a longer one.
        span: the longest sequence of which `window` hides nothing; None is any length.
        softcap: scores are capped.
        alibi: ALiBi is taken off the scores.
        sinks: every head has a learned logit in its denominators.
        reach: the longest sequence over which the layer is what is said here; None is any length.
    """

    name: str
    nheads_q: int
    nheads_kv: int
    head_dim_qk: int
    head_dim_v: int
    latent: tuple[int, int] | None
    base: Mask
    window: Mask
    span: int | None
    softcap: bool
    alibi: bool
    sinks: bool
    reach: int | None

    def spec(self, seqlen: int, dtype: DType) -> AttentionSpec:
        """Return what the layer computes in a prefill of `seqlen` tokens.

        Raises:
            InputError: for head dimensions that no spec takes.
        """
        hides = self.span is not None and seqlen > self.span
        return AttentionSpec(
            dtype=dtype,
            head_dim_qk=self.head_dim_qk,
            head_dim_v=self.head_dim_v,
            mask=self.base & self.window if hides else self.base,
            softcap=self.softcap,
            alibi=self.alibi,
            sinks=self.sinks,
        )

    def decode_spec(self, dtype: DType) -> AttentionSpec:
        """Return what the layer computes for the next token, over a cache of any length.

        Raises:
            InputError: for head dimensions that no spec takes, or tokens that see those after them.
        """
        if not isinstance(self.base, Causal):
            raise InputError("tokens see those after them: nothing is decoded")
        dim_qk, dim_v = self.latent or (self.head_dim_qk, self.head_dim_v)
        return AttentionSpec(
            phase="decode",
            dtype=dtype,
            head_dim_qk=dim_qk,
            head_dim_v=dim_v,
            shared_kv=self.latent is not None,
            # Of one query a causal mask hides nothing; a window stays, as the host knows no lengths.
            mask=full() if self.span is None else self.base & self.window,
            softcap=self.softcap,
            alibi=self.alibi,
            sinks=self.sinks,
        )

    def shard(self, shards: int) -> tuple[int, int] | None:
        """Return the query heads and the heads of the cache of one of so many tensor-parallel shards, if there are.

        Shards that outnumber the heads of the cache have one each.
        """
        nheads_kv = 1 if self.latent else self.nheads_kv
        nheads_q, rest = divmod(self.nheads_q, shards)
        if rest or (nheads_kv % shards and shards % nheads_kv):
            return None
        return nheads_q, max(1, nheads_kv // shards)


def text_part(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the language model's own keys: nested parts laid flat, what their class defaults to filled in."""
    part = config
    inherited: dict[str, object] = {}
    while isinstance(nested := part.get("text_config"), Mapping):
        inherited |= {key: part[key] for key in ("torch_dtype", "dtype") if part.get(key) is not None}
        part = nested
    nested = part.get("attn_config")
    own = {key: value for key, value in part.items() if value is not None}
    defaults = _DEFAULTS.get(str(part.get("model_type")), {})
    return {**defaults, **inherited, **(nested if isinstance(nested, Mapping) else {}), **own}


def attention_layers(text: Mapping[str, object]) -> tuple[list[AttentionLayer], list[str]]:
    """Return the distinct kinds of layers that can be computed at some length, and a sentence on each that cannot.

    Args:
        text: what `text_part` returned.

    Raises:
        InputError: if the keys describe no attention that is known.
    """
    if text.get("is_encoder_decoder"):
        raise InputError("encoder-decoder models are not supported; supported: decoder-only and encoder-only models")
    kinds = _layer_kinds(text)
    # Sizes are read even where nothing can run, so that a file that is no model's is refused as such.
    layers = [_layer(text, kind, index) for index, kind in enumerate(kinds) if kind in _ATTENTION_KINDS]
    blocks = _blocks(text)
    if blocks:
        return [], [f"all attention layers: {block} has no kernel in this version" for block in blocks]
    other = dict.fromkeys(kind for kind in kinds if kind not in _ATTENTION_KINDS)
    skipped = [f"{kind} layers ({kinds.count(kind)} of {len(kinds)}): no kernel in this version" for kind in other]
    return list(dict.fromkeys(layers)), skipped


def _blocks(text: Mapping[str, object]) -> list[str]:
    """Return what every attention layer of the model does that no kernel does."""
    blocks = []
    model_type = str(text.get("model_type"))
    if model_type in _UNUSUAL:
        blocks.append(_UNUSUAL[model_type])
    if str(text.get("position_embedding_type", "")).startswith("relative"):
        blocks.append("relative position bias")
    return blocks


def _layer_kinds(text: Mapping[str, object]) -> list[str]:
    """Return each layer's kind, in the words of `layer_types`."""
    listed = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(listed, list):
        return [str(kind) for kind in listed]
    count = _whole(text, _LAYERS) or 1
    if count > _MAX_LAYERS:
        raise InputError(f"{count} layers are more than the {_MAX_LAYERS} that any known model stays below")
    if _whole(text, ("attention_chunk_size",)):
        special, pattern = "chunked_attention", _whole(text, ("no_rope_layer_interval",))
    elif _window(text):
        special, pattern = "sliding_attention", _whole(text, ("sliding_window_pattern", "_sliding_window_pattern"))
    else:
        cross = text.get("cross_attention_layers")
        listed = cross if isinstance(cross, list) else []
        return ["cross_attention" if index in listed else "full_attention" for index in range(count)]
    if pattern:
        return ["full_attention" if (index + 1) % pattern == 0 else special for index in range(count)]
    # Qwen2: the first layers see everything. Their files carry the key with `use_sliding_window` off, too.
    first = _whole(text, ("max_window_layers",)) or 0
    return ["full_attention" if index < first else special for index in range(count)]


def _window(text: Mapping[str, object]) -> int | None:
    return None if text.get("use_sliding_window") is False else _whole(text, _WINDOW)


def _layer(text: Mapping[str, object], kind: str, index: int) -> AttentionLayer:
    heads = _whole(text, _HEADS, index)
    if heads is None:
        raise InputError(f"describes no attention that is known: none of {', '.join(_HEADS)} is set")
    kv_heads = _kv_heads(text, heads, index)
    rank, latent = _whole(text, ("kv_lora_rank",)), None
    if rank is not None:
        # Latent attention (DeepSeek-V2, section 2.1): in prefill K and V are expanded to one head per query head.
        nope, rope, dim_v = (_required(text, f"{part}_head_dim") for part in ("qk_nope", "qk_rope", "v"))
        # In decoding (section 2.1.2) what expands them is absorbed into Q and the output: rows stay as they are cached.
        kv_heads, dim_qk, latent = heads, nope + rope, (rank + rope, rank)
    else:
        dim_qk = dim_v = _head_dim(text, kind, heads, index)
    if heads % kv_heads:
        raise InputError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    name, window, span = _window_of(text, kind)
    top = _whole(text, ("index_topk",)) if span is None else None
    model_type = text.get("model_type")
    return AttentionLayer(
        name=f"sparse layers (top {top} keys)" if top else name,
        nheads_q=heads,
        nheads_kv=kv_heads,
        head_dim_qk=dim_qk,
        head_dim_v=dim_v,
        latent=latent,
        base=full() if _bidirectional(text) else causal(),
        window=window,
        span=span,
        softcap=bool(text.get("attn_logit_softcapping")),
        alibi=bool(text.get("alibi")) or text.get("position_embedding_type") == "alibi" or model_type in _ALIBI,
        sinks=model_type in _SINKS,
        reach=top,
    )


def _kv_heads(text: Mapping[str, object], heads: int, index: int) -> int:
    # Falcon: num_kv_heads counts only in the new architecture, multi_query only in the old one.
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return _whole(text, _KV_HEADS, index) or heads


def _head_dim(text: Mapping[str, object], kind: str, heads: int, index: int) -> int:
    # Gemma 4 gives its full layers a head dimension of their own.
    names = ("global_head_dim", "head_dim") if kind == "full_attention" else ("head_dim",)
    explicit = _whole(text, names, index)
    if explicit is not None:
        return explicit
    hidden = _whole(text, _HIDDEN)
    if hidden is None or hidden % heads:
        raise InputError(
            f"head_dim is not set, and the width ({'/'.join(_HIDDEN)}: {hidden}) is no multiple of {heads} heads"
        )
    return hidden // heads


def _window_of(text: Mapping[str, object], kind: str) -> tuple[str, Mask, int | None]:
    """Return the layer's name for people, its window or chunk, and up to which length that hides nothing."""
    if kind == "sliding_attention" and (window := _window(text)):
        name = f"sliding-window layers (window {window})"
        if _bidirectional(text):
            half = window // 2
            return name, sliding_window(half, half), half + 1
        # A window of w keeps the keys with i - j < w, the query's own among them.
        return name, sliding_window(window - 1, 0), window
    if kind == "chunked_attention" and (chunk := _whole(text, ("attention_chunk_size",))):
        return f"chunked layers (chunk {chunk})", chunked(chunk), chunk
    return "full-attention layers", full(), None


def _bidirectional(text: Mapping[str, object]) -> bool:
    # Gemma 4 has "vision" here, too: image tokens alone look both ways.
    if text.get("use_bidirectional_attention") in (True, "all") or text.get("is_causal") is False:
        return True
    if text.get("is_decoder"):
        return False
    names = text.get("architectures")
    masked = isinstance(names, list) and any(str(name).endswith("ForMaskedLM") for name in names)
    return masked or text.get("model_type") in _ENCODERS


def dtype_of(text: Mapping[str, object]) -> DType:
    """Return the checkpoint's element type, bf16 where the file names none.

    Raises:
        InputError: if no kernel takes that type, or it is one of weights alone.
    """
    name = text.get("dtype", text.get("torch_dtype"))
    if not isinstance(name, str) or name == "auto":
        return DType.BF16
    try:
        dtype = parse_dtype(name)
    except InputError as error:
        raise InputError(f"the checkpoint's type: {error}; choose one instead") from error
    if dtype is DType.FP8:
        raise InputError(f"the checkpoint's weights are {name}, which says nothing of Q, K and V; choose their type")
    return dtype


def _whole(text: Mapping[str, object], names: Sequence[str], index: int = 0) -> int | None:
    """Return the first of `names` that is set, for layer `index` where it is a list; None if none is, or it is off."""
    for name in names:
        value = text.get(name)
        if isinstance(value, list):
            value = value[index] if index < len(value) else None
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{name} must be a whole number, got {value!r}")
        return value if value > 0 else None
    return None


def _required(text: Mapping[str, object], name: str) -> int:
    value = _whole(text, (name,))
    if value is None:
        raise InputError(f"kv_lora_rank is set (latent attention), but {name} is not")
    return value
