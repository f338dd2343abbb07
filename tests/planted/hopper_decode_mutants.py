"""Bugs of the decode kernel for Hopper in Gluon: they run where they can be killed, as those of the forward one."""

from __future__ import annotations

from mutants import Mutant

from flashgen.codegen import HopperDecodeConfig

CONFIG = HopperDecodeConfig(consumers=2, block_n=64, num_warps=4, num_stages=2)
_SIZES = "b=2 hq=4 hkv=2 sq=100 sk=1000 d=64 fp16 decode"
# Tiles of rows of 25 key tiles, some twelve for each program of an H200, which begins and ends inside of one.
_LONG = "b=15 hq=4 hkv=2 sq=64 sk=1600 d=64 fp16 decode"
# Four tiles of rows, which more than 30 programs of an H200 share each, and end at the same time.
_SHARED = "b=1 hq=4 hkv=2 sq=100 sk=40000 d=64 fp16 decode"
_OFF = r"out\["
_LOST = "out|timeout|crashed|context is lost|launch failure|illegal"


def _edited(words: str, says: str, *edits: tuple[str, str, str], sizes: str = _SIZES) -> Mutant:
    return Mutant(problem=f"{sizes} {words}", config=CONFIG, says=says, edits=edits)


HOPPER_DECODE_MUTANTS = {
    # What is seen.
    "causal, without the diagonal": _edited("causal", _OFF, ("mask_mod", "kv_idx <= q_idx", "kv_idx < q_idx")),
    "last tile of keys forgotten": _edited(
        "full", _OFF, ("sequence_parts", "tl.cdiv(end - start, BLOCK_N)", "(end - start) // BLOCK_N")
    ),
    "keys past the last one copied": _edited(
        "full", _OFF, ("producer", "left = SEQLEN_K - n", "left = BLOCK_N + 0 * n")
    ),
    "no key tile masked but the last": _edited(
        "causal", _OFF, ("consumer", "full_hi = gl.minimum(gl.maximum(full_hi, lo), hi)", "full_hi = hi - 1")
    ),
    "keys before the window": _edited(
        "sliding_window(100,0)",
        _OFF,
        ("consumer", "full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)", "full_lo = lo"),
    ),
    # Which rows, and whose.
    "keys of another head": _edited(
        "full", _OFF, ("producer", "off_hkv = off_h // group", "off_hkv = off_h % (nheads_q // group)")
    ),
    "both consumers with the first one's rows": _edited(
        "causal", _LOST, ("consumer", "start_m += CONSUMER * ROWS", "start_m += 0 * CONSUMER * ROWS")
    ),
    "first page alone": _edited("full page=64", _OFF, ("producer", "pages + n // PAGE_SIZE", "pages + 0 * n")),
    "the first of a tile's pages for all of it": _edited(
        "full page=16", _OFF, ("producer", "pages + k_row + i,", "pages + k_row + 0 * i,")
    ),
    "keys past the last one copied from a page": _edited(
        "full page=16",
        _OFF,
        ("producer", "page_left = left - i * PAGE_SIZE", "page_left = left + BLOCK_N - i * PAGE_SIZE"),
    ),
    "entries of the batch not looked up": _edited(
        "full batch_idx", _OFF, ("producer", "entry = gl.load(cache_batch_idx_ptr + off_z)", "entry = off_z")
    ),
    # Who has which of the key tiles, of more sequences than are looked at together.
    "key tiles of the last sequences alone": _edited("full", _LOST, ("find_share", "total += ", "total = ")),
    "tiles before a program those of the last sequences alone": _edited(
        "full", _LOST, ("find_share", "before += ", "before = ")
    ),
    # What programs leave, and how it is merged.
    "parts merged without their weights": _edited(
        "full", _OFF, ("merge_parts", "beta = gl.exp2(lse2[i] - m_safe)", "beta = gl.exp2(lse2[i] - lse2[i])")
    ),
    "last part not merged": _edited("full", _OFF, ("merge_parts", "program <= last_program", "program < last_program")),
    "first output of a program for its second": _edited(
        "full",
        _OFF,
        ("merge_parts", "gl.where(program == first_program, first_slot, 2 * program)", "2 * program"),
        sizes=_LONG,
    ),
    "outputs of the first consumer merged for both": _edited(
        "full", _OFF, ("merge_parts", "(slot * 2 + CONSUMER)", "(slot * 2 + 0 * CONSUMER)")
    ),
    "one counter for both consumers": _edited(
        "full", f"counters|{_LOST}", ("consumer", "tile * 2 + CONSUMER", "tile * 2")
    ),
    "counter not set back": _edited("full", "counters", ("consumer", "gl.store(arrivals, 0)", "gl.store(arrivals, 1)")),
    "merged without waiting": _edited(
        "full", _LOST, ("consumer", "while arrived < others", "while arrived < 0"), sizes=_SHARED
    ),
    "a tile's last program to merge, too, if it goes on": _edited(
        "full", _LOST, ("producer", "(last_end == tile_unit + num_parts).to(gl.int32)", "1"), sizes=_LONG
    ),
    "lse in base 2": _edited("full", "lse", ("normalise", ") * 0.6931471805599453", ")")),
    "sinks counted twice": _edited(
        "full sinks", _OFF, ("normalise", "gl.exp2(sink - m_safe)", "2.0 * gl.exp2(sink - m_safe)")
    ),
    # What is appended, by the kernel before.
    "new keys not counted": _edited("full append", _OFF, ("append_rows", "used + seqlen_new", "used")),
    "the last new rows not written": _edited(
        "full append",
        _OFF,
        ("append_rows", "num_new = tl.cdiv(seqlen_new, BLOCK_NEW)", "num_new = seqlen_new // BLOCK_NEW"),
    ),
    "rows past the last new one written": _edited(
        "full append page=64",
        _LOST + "|cache",
        ("append_rows", "is_new = offs_new < seqlen_new", "is_new = offs_new >= 0"),
    ),
    "appended one row off": _edited("full append", _OFF, ("append_rows", "places = cached +", "places = cached + 1 +")),
    "appended to the next head": _edited(
        "full append",
        rf"{_OFF}|k cache",
        ("append_rows", "off_hkv.to(tl.int64) * stride_kh", "(1 - off_hkv).to(tl.int64) * stride_kh"),
    ),
    "queries turned by the first one's position": _edited(
        "causal append rotary=halves", _OFF, ("append_rows", "cached + offs_m,", "cached + offs_m * 0,")
    ),
    "the last queries not turned": _edited(
        "full append rotary=pairs",
        _LOST,
        ("append_rows", "num_m = tl.cdiv(SEQLEN_Q, BLOCK_NEW)", "num_m = SEQLEN_Q // BLOCK_NEW"),
    ),
    # Barriers.
    "values not waited for": _edited(
        "full", _LOST, ("attend", "    wait(v_full.index(before), (step - 1) // NUM_STAGES & 1)\n", "")
    ),
    "queries not waited for": _edited(
        "full", _LOST, ("consumer", "        wait(q_full.index(CONSUMER), turn & 1)\n", "")
    ),
}
