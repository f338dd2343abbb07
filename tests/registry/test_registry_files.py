from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flashgen.codegen import TritonBackwardConfig, TritonDecodeConfig
from flashgen.errors import RegistryError
from flashgen.registry import RegistryEntry, load_indexed, merge, read_file, write_entries
from flashgen.registry.files import file_name
from flashgen.registry.yaml_text import dump
from flashgen.spec import parse_mask, parse_problem
from flashgen.spec.mods import parse_mod

NAME = "nvidia_h200.forward.yaml"


def test_file_is_named_after_device_and_phase() -> None:
    assert file_name("NVIDIA H200", "forward") == NAME
    assert file_name("NVIDIA A100-SXM4-80GB", "forward") == "nvidia_a100_sxm4_80gb.forward.yaml"
    assert file_name("../../evil", "forward") == "evil.forward.yaml"
    with pytest.raises(RegistryError, match="letter"):
        file_name("--", "forward")


def test_round_trip_is_exact_and_byte_stable(tmp_path, make_entry) -> None:
    entries = [make_entry(s) for s in (4096, 128, 1024)]
    (path,) = write_entries(tmp_path / "a", entries)
    contents = read_file(path)
    assert contents.issues == ()
    assert contents.entries == merge(entries, ())
    assert [e.digest() for e in contents.entries] == [e.digest() for e in merge(entries, ())]
    (again,) = write_entries(tmp_path / "b", reversed(entries))
    assert again.read_bytes() == path.read_bytes()
    assert contents.entries[0].provenance.triton == "3.10"


def test_phases_have_files_of_their_own(tmp_path, make_entry) -> None:
    forward = make_entry()
    config = TritonBackwardConfig(block_m1=64, block_n1=128, num_warps=8, num_stages=2, dq="atomic", loads="descriptor")
    backward = [
        dataclasses.replace(forward, spec=forward.spec.backward(deterministic=deterministic), config=config)
        for deterministic in (False, True)
    ]
    paths = write_entries(tmp_path, [*backward, forward])
    assert sorted(path.name for path in paths) == ["nvidia_h200.backward.yaml", NAME]
    contents = read_file(tmp_path / "nvidia_h200.backward.yaml")
    assert contents.issues == ()
    assert set(contents.entries) == set(backward)
    assert all(entry.config == config for entry in contents.entries)
    indexed = load_indexed(tmp_path / "nvidia_h200.backward.yaml")
    for entry in backward:
        assert indexed.candidates(entry.spec) == (entry,)
        assert set(indexed.related(entry.spec)) == set(backward) - {entry}
    assert indexed.candidates(forward.spec) == indexed.related(forward.spec) == ()


def test_text_does_not_depend_on_libyaml(tmp_path, make_entry) -> None:
    # PyYAML comes with and without libyaml: the same text either way.
    script = (
        "import sys, yaml; [delattr(yaml, n) for n in ('CSafeLoader', 'CSafeDumper') if hasattr(yaml, n)];"
        "from pathlib import Path; from flashgen.registry.files import read_file, dump;"
        "sys.stdout.buffer.write(dump(read_file(Path(sys.argv[1])).entries))"
    )
    (path,) = write_entries(tmp_path, [make_entry(128), make_entry(256, median_us=1e-7)])
    pure = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, check=True)
    assert pure.stdout == path.read_bytes()


def test_leaf_mappings_take_one_line(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path, [make_entry()])
    lines = path.read_text().splitlines()
    assert "- spec: {dtype: bf16, head_dim_qk: 128, head_dim_v: 128, mask: causal}" in lines
    assert lines[1:5] == ["format: 1", "device: NVIDIA H200", "arch: sm_90", "phase: forward"]
    assert any("triton: '3.10'" in line for line in lines)
    assert len(lines) < 20


def test_second_write_merges_and_an_unchanged_one_leaves_the_file_alone(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path, [make_entry(128)])
    write_entries(tmp_path, [make_entry(256)])
    assert [e.range.seqlen_q.lo for e in read_file(path).entries] == [128, 256]
    before = path.stat()
    write_entries(tmp_path, [make_entry(256)])
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_each_device_gets_its_file(tmp_path, make_entry) -> None:
    paths = write_entries(tmp_path, [make_entry(), make_entry(device_name="AMD Instinct MI300X", arch="gfx942")])
    assert [p.name for p in paths] == ["amd_instinct_mi300x.forward.yaml", NAME]
    with pytest.raises(RegistryError, match=r"one device.*NVIDIA-H200.*move the file"):
        write_entries(tmp_path, [make_entry(device_name="NVIDIA-H200")])


# What befalls a file of three entries: the bytes, the line to report, what the reason says, how many entries survive.
def _truncated(data: bytes) -> bytes:
    return data[: data.rindex(b"template_digest")]


def _line_of(data: bytes, text: bytes, occurrence: int = 1) -> int:
    position = -1
    for _ in range(occurrence):
        position = data.index(text, position + 1)
    return data.count(b"\n", 0, position) + 1


BOMB = b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"

FILE_DAMAGE = {
    "truncated": (_truncated, -1, "flow node"),
    "binary": (lambda d: b"\x00\x01\x02" + d, 1, "special characters|control characters"),
    "not utf-8": (lambda d: d.replace(b"cudnn", b"cudn\xff", 1), "cudnn", "UTF-8"),
    "empty": (lambda d: b"", None, "empty"),
    "only text": (lambda d: b"hello\n", 1, "mapping"),
    "two documents": (lambda d: d + b"---\nx: 1\n", -2, "another document|single document"),
    "foreign format": (lambda d: d.replace(b"format: 1", b"format: 2"), 2, "format is 2"),
    "no format": (lambda d: d.replace(b"format: 1\n", b""), 2, "format is None"),
    "unknown header": (lambda d: d.replace(b"arch:", b"extra: 1\narch:"), 4, "extra"),
    "no entries": (lambda d: d[: d.index(b"entries:")], 2, "entries"),
    "entries no list": (lambda d: d[: d.index(b"entries:")] + b"entries: {}\n", 6, "entries"),
    "duplicate header": (
        lambda d: d.replace(b"arch: sm_90\n", b"arch: sm_90\narch: sm_80\n"),
        5,
        "'arch' is given twice",
    ),
    "alias bomb": (lambda d: BOMB + d, 1, "anchors and aliases"),
    # PyYAML has a limit of its own since 6.0.4.
    "deep": (lambda d: b"x: " + b"[" * 5000 + d, 1, "nested deeper|nesting depth"),
    "long value": (lambda d: b"x: " + b"9" * 100_000 + b"\n" + d, 1, "longer"),
    "huge": (lambda d: d + b"#" * (8 * 2**20), None, "8 MiB"),
    "escape sequence": (lambda d: d.replace(b"NVIDIA H200", b'"\\e[31mH200"'), 3, "control characters"),
}


@pytest.mark.parametrize("name", FILE_DAMAGE)
def test_damaged_file_is_reported_skipped_and_never_overwritten(name, tmp_path, make_entry) -> None:
    damage, place, reason = FILE_DAMAGE[name]
    (path,) = write_entries(tmp_path, [make_entry(s) for s in (128, 256, 512)])
    sound = path.read_bytes()
    damaged = damage(sound)
    path.write_bytes(damaged)
    contents = read_file(path)
    assert contents.entries == ()
    (issue,) = contents.issues
    line = place
    if isinstance(place, str):
        line = _line_of(sound, place.encode())
    elif place is not None and place < 0:
        line = len(damaged.splitlines()) + place + 1
    assert issue.path == path
    assert issue.line == line, issue
    with pytest.raises(RegistryError, match=reason) as caught:
        write_entries(tmp_path, [make_entry(1024)])
    assert str(issue) in str(caught.value)
    assert "move it away" in str(caught.value)
    assert path.read_bytes() == damaged
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".{NAME}.lock", NAME]


# One entry of three is hurt: what is replaced, by what, in which line the reader must see it, the reason.
ENTRY_DAMAGE = {
    "edited number": (b"num_warps: 8", b"num_warps: 4", b"  digest:", "edited by hand"),
    "edited result": (b"median_us: 123.5", b"median_us: 99.5", b"  digest:", "edited by hand"),
    "wrong type": (b"registers: 168", b"registers: many", b"  resources:", r"resources.registers.*'many'"),
    "bool for a number": (b"spills: 0", b"spills: true", b"  resources:", "resources.spills"),
    "float for an integer": (b"trials: 120", b"trials: 1.5", b"  provenance:", "provenance.trials"),
    "version as a number": (b"triton: '3.10'", b"triton: 3.10", b"  provenance:", "provenance.triton"),
    "negative": (b"smem_bytes: 98304", b"smem_bytes: -1", b"  resources:", "resources.smem_bytes"),
    "infinite": (b"tflops: 612.3", b"tflops: .inf", b"  performance:", "performance.tflops"),
    "unknown field": (b"spills: 0", b"spills: 0, oops: 1", b"  resources:", "resources.oops"),
    "missing field": (b"spills: 0, ", b"", b"  resources:", "resources.spills: Field required"),
    "duplicate key": (b"spills: 0", b"spills: 0, spills: 0", b"  resources:", "'spills' is given twice"),
    "unknown tag": (b"spills: 0", b"spills: !!python/name:os.system x", b"  resources:", "python/name"),
    "date without quotes": (b"'2026-11-22T07:00:00Z'", b"2026-11-22T07:00:00Z", b"  provenance:", "timestamp"),
    "wrong origin": (b"origin: measured", b"origin: guessed", b"  origin:", "origin"),
    "no mapping": (
        b"resources: {registers: 168, spills: 0, smem_bytes: 98304}",
        b"resources: 5",
        b"  resources:",
        "resources",
    ),
}


@pytest.mark.parametrize("name", ENTRY_DAMAGE)
def test_damaged_entry_is_reported_and_only_that_one_skipped(name, tmp_path, make_entry) -> None:
    old, new, marker, reason = ENTRY_DAMAGE[name]
    (path,) = write_entries(tmp_path, [make_entry(s) for s in (128, 256, 512)])
    sound = path.read_bytes()
    head, first, second, third = sound.split(b"\n- spec")
    assert old in second
    damaged = b"\n- spec".join([head, first, second.replace(old, new, 1), third])
    path.write_bytes(damaged)
    contents = read_file(path)
    assert [e.range.seqlen_q.lo for e in contents.entries] == [128, 512]
    (issue,) = contents.issues
    assert issue.line == _line_of(sound, marker, occurrence=2), issue
    with pytest.raises(RegistryError, match=reason):
        write_entries(tmp_path, [make_entry(1024)])
    assert path.read_bytes() == damaged


MASK_MOD = "mask_mod('return ids[b, q_idx] == ids[b, kv_idx]', ids='int32[b,any]')"
SCORE_MOD = "score_mod('return score - slopes[h] * (q_idx - kv_idx)', slopes='float32[h]')"


def _with_features(entry: RegistryEntry) -> RegistryEntry:
    spec = dataclasses.replace(
        entry.spec,
        mask=parse_mask(f"{MASK_MOD}&sliding_window(127,0)"),
        score_mod=parse_mod(SCORE_MOD),
        softcap=True,
        varlen=True,
        bias="fp32",
    )
    return dataclasses.replace(entry, spec=spec)


def test_features_are_written_on_the_line_of_the_spec(tmp_path, make_entry) -> None:
    entries = [make_entry(128), _with_features(make_entry(128)), _with_features(make_entry(256))]
    (path,) = write_entries(tmp_path, entries)
    contents = read_file(path)
    assert contents.issues == ()
    assert set(contents.entries) == set(entries)
    lines = path.read_text().splitlines()
    assert "- spec: {dtype: bf16, head_dim_qk: 128, head_dim_v: 128, mask: causal}" in lines
    (line, _) = [line for line in lines if "features: [softcap, varlen, bias=fp32]" in line]
    assert yaml.safe_load(line)[0]["spec"]["score_mod"] == SCORE_MOD
    assert set(load_indexed(path).entries()) == set(entries)


def test_a_mask_of_any_legal_length_is_kept_on_one_line(tmp_path, make_entry) -> None:
    source = f"return {' + '.join(f'q_idx * {i} % 7' for i in range(60))} > kv_idx"
    spec = dataclasses.replace(make_entry().spec, mask=parse_mask(f"mask_mod({source!r})"))
    entry = dataclasses.replace(make_entry(), spec=spec)
    assert len(str(spec.mask)) > 500
    (path,) = write_entries(tmp_path, [entry])
    assert read_file(path).entries == (entry,)
    assert len(path.read_text().splitlines()) < 20


# What stands in the place of the spec of an entry, its digest right: a file may come from anywhere.
HOSTILE_SPECS = {
    "code": ({"mask": 'mask_mod(\'return __import__("os").system("true")\')'}, "mask_mod"),
    "escape in code": ({"mask": r"mask_mod('return \x1b[31mq_idx')"}, "mask_mod"),
    "statement": ({"mask": "mask_mod('import os; return True')"}, "mask_mod"),
    "call": ({"mask": "exec('1')"}, "unknown mask"),
    "unhashable": ({"mask": "sliding_window({[]:1},0)"}, "mask|left"),
    "deep": ({"mask": "~" * 3000 + "causal"}, "unknown mask"),
    "long": ({"mask": "causal&" * 3000 + "causal"}, "longer than 20000 characters"),
    "escape": ({"mask": "\x1b[31mcausal"}, "control characters"),
    "newline": ({"score_mod": "score_mod('return score')\n"}, "control characters"),
    "empty score_mod": ({"score_mod": ""}, "at least 1 character"),
    "null score_mod": ({"score_mod": None}, "valid string"),
    "mask as score_mod": ({"score_mod": "mask_mod('return q_idx > kv_idx')"}, "must be the text of a score_mod"),
    "score_mod as mask": ({"mask": "score_mod('return score')"}, "unknown mask"),
    "no list": ({"features": "softcap"}, "valid list"),
    "empty list": ({"features": []}, "at least 1 item"),
    "many": ({"features": ["softcap"] * 17}, "at most 16 items"),
    "unknown": ({"features": ["softcup"]}, "unknown feature 'softcup'"),
    "twice": ({"features": ["softcap", "softcap"]}, "softcap is given twice"),
    "no key": ({"features": ["sinks"]}, "tuning_key"),
    "dtype": ({"dtype": "int8"}, "unknown dtype"),
    "head_dim": ({"head_dim_qk": 1 << 20}, "multiple of 8 from 16 to 512"),
    "unknown field": ({"sparsity": 3}, "sparsity"),
}


@pytest.mark.parametrize("name", HOSTILE_SPECS)
def test_a_spec_from_a_stranger_is_an_issue_and_nothing_else(name, tmp_path, make_entry, monkeypatch) -> None:
    change, reason = HOSTILE_SPECS[name]
    entry = make_entry()
    content = entry.as_dict()
    content["spec"] = {**content["spec"], **change}
    monkeypatch.setattr(RegistryEntry, "as_dict", lambda self: {**content})
    path = tmp_path / NAME
    path.write_bytes(dump([entry]))
    contents = read_file(path)
    assert contents.entries == ()
    (issue,) = contents.issues
    assert re.search(reason, issue.reason), issue.reason
    assert len(str(issue)) < 1_000
    assert str(issue).isprintable()
    assert load_indexed(path).issues == contents.issues


def test_what_shipped_before_still_reads() -> None:
    path = Path(__file__).parents[2] / "flashgen" / "tuned" / NAME
    contents = read_file(path)
    assert contents.issues == ()
    assert len(contents.entries) >= 20


def test_no_bytes_make_the_reader_raise_or_believe_a_lie(tmp_path, make_entry) -> None:
    entries = merge([make_entry(s) for s in (128, 256)], ())
    sound = dump(entries)
    rng = random.Random(3)
    path = tmp_path / NAME
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(data))
            data[start : start + rng.randrange(4)] = rng.choice(
                (b"", b"\xff", b"{", b"- ", b"9", b": ", b"&a ", b"\n", b"'")
            )
        path.write_bytes(data)
        contents = read_file(path)
        # The header of the file is part of every digest: no entry is altered unseen.
        assert set(contents.entries) <= set(entries), bytes(data)
        assert contents.issues or contents.entries == entries, bytes(data)


def test_value_outside_its_meaning_is_an_issue_even_with_a_right_digest(tmp_path, make_entry, monkeypatch) -> None:
    entry = make_entry()
    changed = entry.as_dict()
    changed["config"] = {**entry.config.as_dict(), "template": "triton/unheard_of"}
    monkeypatch.setattr(RegistryEntry, "as_dict", lambda self: {**changed})
    path = tmp_path / NAME
    path.write_bytes(dump([entry]))
    contents = read_file(path)
    assert contents.entries == ()
    assert "triton/unheard_of" in contents.issues[0].reason
    assert contents.issues[0].line == 7


def test_folder_and_nothing_in_place_of_a_file(tmp_path, make_entry) -> None:
    (tmp_path / NAME).mkdir()
    assert "regular file" in read_file(tmp_path / NAME).issues[0].reason
    assert "cannot be read" in read_file(tmp_path / "absent.yaml").issues[0].reason
    with pytest.raises(RegistryError, match="regular file"):
        write_entries(tmp_path, [make_entry()])
    assert (tmp_path / NAME).is_dir()


def test_what_would_not_read_back_is_not_written(tmp_path, make_entry) -> None:
    with pytest.raises(RegistryError, match=r"not written.*control characters"):
        write_entries(tmp_path, [make_entry(device_name="H200\x1b[31m")])
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(errno.ENOSPC, "No space left on device"), RegistryError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk full", "interrupted"],
)
def test_failed_write_leaves_the_old_file_and_no_other(
    function, error, seen, tmp_path, make_entry, monkeypatch
) -> None:
    (path,) = write_entries(tmp_path, [make_entry(128)])
    before, names = path.read_bytes(), sorted(p.name for p in tmp_path.iterdir())

    def fail(*args: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, function, fail)
        with pytest.raises(seen) as caught:
            write_entries(tmp_path, [make_entry(256)])
    assert caught.value is error or "No space left" in str(caught.value)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    write_entries(tmp_path, [make_entry(256)])
    assert len(read_file(path).entries) == 2


def _write_and_die(folder: Path, entry: RegistryEntry) -> None:
    os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    write_entries(folder, [entry])


def test_killed_writer_leaves_the_old_file_and_no_lock(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path, [make_entry(128)])
    before = path.read_bytes()
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(tmp_path, make_entry(256)))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    write_entries(tmp_path, [make_entry(512)])
    assert [e.range.seqlen_q.lo for e in read_file(path).entries] == [128, 512]


def _write_one_by_one(folder: Path, entries: list[RegistryEntry]) -> None:
    for entry in entries:
        write_entries(folder, [entry])


def test_concurrent_writers_lose_nothing(tmp_path, make_entry) -> None:
    parts = [[make_entry(16 * (1 + worker + 4 * i)) for i in range(6)] for worker in range(4)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_one_by_one, args=(tmp_path, part)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    contents = read_file(tmp_path / NAME)
    assert contents.issues == ()
    assert contents.entries == merge([entry for part in parts for entry in part], ())


def test_written_file_is_plain_yaml(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path, [make_entry()])
    content = yaml.safe_load(path.read_text())
    assert content["entries"][0]["range"]["seqlen_q"] == [4096, 4096]
    assert content["entries"][0]["performance"]["baseline_us"] is None


def test_entries_of_decoding_have_a_file_of_their_own(tmp_path, make_entry) -> None:
    config = TritonDecodeConfig(block_m=16, block_n=64, num_warps=4, num_stages=3, launch="dependent", programs=4)
    spec = parse_problem("h=1 sq=1 sk=64 d=576 dv=512 shared_kv fp8_kv decode").spec
    decode = dataclasses.replace(make_entry(4096), spec=spec, config=config, runners_up=())
    paths = write_entries(tmp_path, [make_entry(4096), decode])
    assert [path.name for path in paths] == ["nvidia_h200.decode.yaml", "nvidia_h200.forward.yaml"]
    assert read_file(paths[0]).entries == (decode,)
    assert "phase: decode" in paths[0].read_text()
    assert "features: [fp8_kv, shared_kv]" in paths[0].read_text()
