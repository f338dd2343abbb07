"""Registry files, indexes and texts of masks under coverage-guided bytes.

    python tests/fuzz/registry_atheris.py -runs=20000

Needs `pip install atheris`; options are libFuzzer's (`-max_total_time=300`, a file with a finding to run it again). The
first byte of an input says what the others are: a whole file, an index, a mask or score, or changes to a sound file
whose digests are then made right again. pytest does not collect it; tests/registry/test_fuzz.py holds the same
properties on fewer inputs.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flashgen", "yaml"]):
    import yaml

    from flashgen.errors import FlashgenError
    from flashgen.registry import load_indexed, read_file
    from flashgen.registry.entry import digest_of
    from flashgen.registry.index import index_path
    from flashgen.registry.yaml_text import dump, readable
    from flashgen.resources import shipped_registry_dir
    from flashgen.spec import parse_mask
    from flashgen.spec.mods import parse_mod

FOLDER = Path(tempfile.mkdtemp())
FILE, SOUND_FILE = (FOLDER / folder / "nvidia_h200.forward.yaml" for folder in ("any", "sound"))
ENTRY = dataclasses.replace(read_file(shipped_registry_dir() / FILE.name).entries[0], runners_up=())
SOUND = dump([ENTRY])
DOCUMENT = yaml.safe_load(SOUND)


def check_file(data: bytes) -> None:
    """Read any bytes as a registry file, without and with an index."""
    FILE.write_bytes(data)
    contents = read_file(FILE)
    assert all(str(issue).isprintable() and len(issue.reason) <= 600 for issue in contents.issues)
    assert load_indexed(FILE).entries() == contents.entries
    assert FILE.read_bytes() == data
    if contents.entries:
        readable(FILE, dump(contents.entries), contents.entries)


def check_index(data: bytes) -> None:
    """Read any bytes in an index, or as one: no answer may change."""
    kept = index_path(SOUND_FILE)
    whole = kept.read_bytes()
    at = int.from_bytes(data[:2], "big")
    kept.write_bytes(data[2:] if at >= len(whole) else whole[:at] + data[2:] + whole[at + len(data) - 2 :])
    indexed = load_indexed(SOUND_FILE)
    assert indexed.candidates(ENTRY.spec) == indexed.entries() == (ENTRY,)
    kept.write_bytes(whole)


def check_text(data: bytes) -> None:
    """Read any text as a mask and as a function."""
    text = data.decode(errors="surrogateescape")
    for source in (text, f"mask_mod({text!r})", f"score_mod({text!r})"):
        for parse in (parse_mask, parse_mod):
            try:
                value = parse(source)
            except FlashgenError:
                continue
            assert parse(str(value)) == value


def check_forgery(data: bytes) -> None:
    """Put any value into a sound file, with the digest that fits."""
    provider = atheris.FuzzedDataProvider(data)
    content = copy.deepcopy(DOCUMENT)
    entry = content["entries"][0]
    owner = entry
    while True:
        steps = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        if not steps:
            return
        step = steps[provider.ConsumeIntInRange(0, len(steps) - 1)]
        if not isinstance(owner[step], (dict, list)) or provider.ConsumeIntInRange(0, 3) == 0:
            break
        owner = owner[step]
    kind = provider.ConsumeIntInRange(0, 5)
    if kind == 0:
        owner[step] = provider.ConsumeInt(9)
    elif kind == 1:
        owner[step] = provider.ConsumeFloat()
    elif kind == 2:
        owner[step] = [None, True, {}, [], ""][provider.ConsumeIntInRange(0, 4)]
    elif kind == 3 and isinstance(owner, dict):
        owner[provider.ConsumeUnicode(20)] = 0
    elif kind == 4:
        del owner[step]
    else:
        owner[step] = provider.ConsumeUnicode(4096)
    body = {name: content[name] for name in ("device", "arch", "phase")}
    try:
        entry["digest"] = digest_of(body | {name: value for name, value in entry.items() if name != "digest"})
    except ValueError:
        return
    check_file(yaml.safe_dump(content).encode(errors="surrogatepass"))


CHECKS = (check_file, check_index, check_text, check_forgery)


def check(data: bytes) -> None:
    """Check one input."""
    if data:
        CHECKS[data[0] % len(CHECKS)](data[1:])


def main() -> None:
    """Run libFuzzer on the process's arguments, from a sound file, an index and two functions on."""
    os.environ["FLASHGEN_CACHE"] = str(FOLDER / "cache")
    # Waiting for the disk is most of the time, and no input here is about a crash.
    os.fsync = lambda handle: None
    for path in (FILE, SOUND_FILE):
        path.parent.mkdir()
        path.write_bytes(SOUND)
        load_indexed(path)
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(
        (
            b"\0" + SOUND,
            b"\1\0\0" + b"0" * 50,
            b"\2return (q_idx // 2 > kv_idx) & (q_idx - kv_idx < 99)",
            b"\2return score * 0.5 + q_idx",
            b"\2causal & ~sliding_window(127, 0) | prefix_lm(5)",
            b"\3" + bytes(range(64)),
        )
    ):
        (seeds / str(number)).write_bytes(seed)
    named = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    atheris.Setup([*sys.argv, *([] if named else [str(seeds)])], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
