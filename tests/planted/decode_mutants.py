"""Bugs of the decode kernel. Those of programs that wait for each other show only where they run at once: on a GPU."""

from __future__ import annotations

from mutants import Mutant

from flashgen.codegen import TritonDecodeConfig

CONFIG = TritonDecodeConfig(block_m=16, block_n=16, num_warps=1, num_stages=1, programs=1)
# Two programs to a team, in the interpreter, too, whose parts are read one at a time.
TEAMS = TritonDecodeConfig(block_m=16, block_n=16, num_warps=1, num_stages=1, programs=2, merge_parts=1)
_SIZES = "b=2 hq=2 hkv=1 sq=2 sk=40 d=16 fp16 decode"
# Tiles of rows of 25 key tiles, six for each program of an H200: small shapes give its programs one each.
_LONG = "b=15 hq=4 hkv=2 sq=1 sk=400 d=16 fp16 decode"
# The same with as many pieces to merge as a tile has programs, and more.
_WIDE = "b=15 hq=32 hkv=2 sq=1 sk=400 d=64 fp16 decode"
# Two tiles of rows of 400 key tiles, which more than 60 programs of an H200 share, and end at the same time.
_SHARED = "b=1 hq=4 hkv=2 sq=1 sk=6400 d=16 fp16 decode"
_OFF = r"out\["
_NAN = r"out\[.* is nan"
_UNWRITTEN = "of out are not written|is nan|timeout"
_IN_LAST_PART = "tl.where(part + parts == num_parts, seqlen_new, 0)"


def _edited(
    words: str, says: str, *edits: tuple[str, str, str], sizes: str = _SIZES, config: TritonDecodeConfig = CONFIG
) -> Mutant:
    return Mutant(problem=f"{sizes} {words}", config=config, says=says, edits=edits)


DECODE_MUTANTS = {
    # What is seen.
    "last tile of keys forgotten": _edited(
        "full", _OFF, ("sequence_parts", "tl.cdiv(end - start, BLOCK_N)", "(end - start) // BLOCK_N")
    ),
    "causal, without the diagonal": _edited("causal", _OFF, ("mask_mod", "kv_idx <= q_idx", "kv_idx < q_idx")),
    "causal, all rows of a tile end with the first": _edited(
        "causal", _OFF, ("attn_decode", "last_m - first_m + 1", "last_m - last_m + 1")
    ),
    "values past the last key not masked": _edited(
        "full", _NAN, ("attend", "BLOCK_DV,\n            MASKED,", "BLOCK_DV,\n            False,")
    ),
    "padding attended to": _edited("full leftpad", _OFF, ("attend", "visible = visible & (kv_idx >= pad)", "")),
    "sinks counted in every part": _edited(
        "full sinks", _OFF, ("attn_decode", "tl.where(part == 0", "tl.where(part >= 0")
    ),
    # Which rows.
    "heads of a group mixed up with queries": _edited(
        "full", _OFF, ("attn_decode", "off_hkv * group + rows % group", "off_hkv * group + rows // SEQLEN_Q")
    ),
    "merged rows of other heads": _edited(
        "full", _OFF, ("attn_decode", "(start_m + offs_r) % group", "(start_m + offs_r) // SEQLEN_Q")
    ),
    # Who has which of the key tiles, of more sequences than are looked at together.
    "key tiles of the last sequences alone": _edited("full", _OFF, ("attn_decode", "total += ", "total = ")),
    # What programs leave, and how it is merged.
    "last part not merged": _edited(
        "full", _OFF, ("merge_partials", "program <= last_program", "program < last_program")
    ),
    "parts merged without their weights": _edited(
        "full",
        _OFF,
        ("merge_partials", "tl.math.exp2(lse2[i] - m_safe)", 'tl.where(lse2[i] > float("-inf"), 1.0, 0.0)'),
    ),
    "merged output not rescaled": _edited(
        "full", _OFF, ("merge_partials", "acc = acc * alpha[:, None]", "acc = acc"), config=TEAMS
    ),
    "parts of another tile merged": _edited("full", _OFF, ("merge_partials", "PARTS * lanes,", "PARTS,"), config=TEAMS),
    "merged lse in base 2": _edited("full lse", r"lse\[", ("attn_decode", "lse2 * 0.6931471805599453", "lse2")),
    "second tile left where the first one is": _edited(
        "full", _OFF, ("attn_decode", "program_id(0) + (unit != first_unit).to(tl.int32)", "program_id(0)"), sizes=_LONG
    ),
    "first part looked for where first tiles are": _edited(
        "full", _OFF, ("attn_decode", "first_program + is_second.to(tl.int32)", "first_program"), sizes=_LONG
    ),
    "arrivals not set back": _edited(
        "full", rf"counters|{_OFF}", ("attn_decode", "tl.store(arrivals, 0)", "tl.store(arrivals, left)")
    ),
    # Where the cache has it.
    "page of the step before": _edited(
        "full page=16", _OFF, ("attend", "page_of(n + BLOCK_N,", "page_of(n,"), sizes=_LONG
    ),
    "second half of a page as the first": _edited(
        "full page=32", _OFF, ("cache_rows", "offs_n % PAGE_SIZE", "offs_n % (PAGE_SIZE // 2)")
    ),
    "entries of the cache in order": _edited(
        "full batch_idx", _OFF, ("attn_decode", "tl.load(cache_batch_idx_ptr + off_z)", "off_z")
    ),
    "shared keys past the last one not masked": _edited(
        "full shared_kv", _NAN, ("attend", "BLOCK_DQK,\n            MASKED,", "BLOCK_DQK,\n            False,")
    ),
    # What is appended.
    "new keys not attended to": _edited("full append", _OFF, ("attn_decode", _IN_LAST_PART, "seqlen_new * 0")),
    "new keys attended to in every part": _edited("full append", _OFF, ("attn_decode", _IN_LAST_PART, "seqlen_new")),
    "nothing appended": _edited("full append", r"k cache\[", ("attn_decode", "& (part == 0)", "& (part < 0)")),
    "appended one row off": _edited(
        "full append", r"k cache\[", ("attn_decode", "places = cached +", "places = cached + 1 +")
    ),
    "queries turned as the first one": _edited(
        "causal append rotary=halves", _OFF, ("attn_decode", "cached + offs_m,", "cached + offs_m * 0,")
    ),
    "turned the other way": _edited("full append rotary=halves", _OFF, ("load_rotated", "-sin, sin)", "sin, -sin)")),
}

# One program after the other, as in the interpreter, none waits.
WAITING_MUTANTS = {
    "merged without waiting": _edited(
        "full", _OFF, ("attn_decode", "while arrived < others", "while arrived < 0"), sizes=_SHARED
    ),
    "a tile's first program merges nothing if it began another": _edited(
        "full",
        _UNWRITTEN,
        ("attn_decode", "merges = unit + parts == last_unit", "merges = unit == first_unit"),
        sizes=_LONG,
    ),
    "a tile's last program to merge, too, if it goes on": _edited(
        "full", _UNWRITTEN, ("attn_decode", "(last_end == tile_unit + num_parts).to(tl.int32)", "1"), sizes=_WIDE
    ),
}
