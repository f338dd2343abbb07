from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashgen import resources
from flashgen.errors import RegistryError
from flashgen.registry import (
    Location,
    Registry,
    clear_bundles,
    export_bundle,
    generation,
    index,
    load,
    load_indexed,
    search_locations,
    use_bundle,
    write_entries,
)
from flashgen.spec import DType, full, parse_mask

NAME = "nvidia_h200.forward.yaml"


def _refuse_yaml(path: Path) -> None:
    raise AssertionError(f"{path} was parsed though its index is fresh")


def signed(data: bytes, change: Callable[[object], object]) -> bytes:
    """Return an index whose header is changed by somebody who knows how its checksum is made."""
    head, rows = data.split(b"\n", 1)
    line = json.dumps(change(json.loads(head[8:]))).encode() + b"\n"
    return b"%08x" % index.zlib.crc32(line) + line + rows


def test_index_hit_gives_the_same_entries_without_parsing(tmp_path, make_entry, monkeypatch) -> None:
    entries = [make_entry(s, head_dim=d) for s in (128, 256) for d in (64, 128)]
    (path,) = write_entries(tmp_path / "r", entries)
    miss = load_indexed(path)
    monkeypatch.setattr(index, "_parse_yaml", _refuse_yaml)
    hit = load_indexed(path)
    wanted = make_entry(head_dim=128).spec
    assert [e.range.seqlen_q.lo for e in hit.candidates(wanted)] == [128, 256]
    assert hit.candidates(dataclasses.replace(wanted, lse=True)) == hit.candidates(wanted)
    assert hit.candidates(dataclasses.replace(wanted, mask=full())) == ()
    assert hit.entries() == miss.entries()
    assert len(hit.entries()) == 4


def test_import_and_index_hit_need_neither_yaml_nor_pydantic(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path / "r", [make_entry()])
    load_indexed(path)
    script = (
        "import sys; from pathlib import Path; import flashgen.registry as r\n"
        "file = r.load_indexed(Path(sys.argv[1])); print(len(file.entries()))\n"
        "print([m for m in ('yaml', 'pydantic', 'filelock', 'torch', 'triton') if m in sys.modules])\n"
        "r.read_file; print('yaml' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["1", "[]", "True"]


def test_index_follows_an_edit_of_the_file(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path, [make_entry(128)])
    assert len(load_indexed(path).entries()) == 1
    write_entries(tmp_path, [make_entry(256)])
    assert len(load_indexed(path).entries()) == 2
    path.write_text(path.read_text().replace("num_warps: 8", "num_warps: 4", 1))
    edited = load_indexed(path)
    assert len(edited.entries()) == 1
    assert len(edited.issues) == 1
    # Issues are never kept in an index: the second look must report them too.
    assert load_indexed(path).issues == edited.issues


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"\xff\x00garbage",
        lambda data: data[:-10],
        lambda data: data.replace(b'"num_warps":8', b'"num_warps":4'),
        lambda data: data.replace(b'"version": 3', b'"version": 9'),
        lambda data: signed(data, lambda head: head | {"version": 99}),
        lambda data: signed(data, lambda head: [1, 2]),
        lambda data: signed(data, lambda head: head | {"blocks": {"key": 5}}),
        lambda data: data.replace(b"forward bf16", b"forward fp16"),
        lambda data: b"[" * 200_000 + data,
        lambda data: b"%08x" % index.zlib.crc32(b"[" * 200_000 + b"\n") + b"[" * 200_000 + b"\n",
    ],
    ids=[
        *("empty", "binary", "truncated", "flipped", "flipped version", "other version", "not a header", "no block"),
        *("other spec", "deep", "deep and signed"),
    ],
)
def test_corrupt_index_counts_as_none(damage, tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path / "r", [make_entry(128), make_entry(256)])
    expected = load_indexed(path).entries()
    kept = index.index_path(path)
    data = kept.read_bytes()
    assert damage(data) != data
    kept.write_bytes(damage(data))
    assert load_indexed(path).entries() == expected


@pytest.mark.parametrize(
    "row", [b"[1]\n", b'{"device": 1}\n', b"[" * 200_000 + b"\n", b"9" * 5000 + b"\n", b"\xff\n"], ids=range(5)
)
def test_rows_of_any_kind_fall_back_to_yaml(row, tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path / "r", [make_entry()])
    expected = load_indexed(path).entries()
    kept = index.index_path(path)
    head, _ = kept.read_bytes().split(b"\n", 1)
    blocks = {key: [len(row), index.zlib.crc32(row)] for key in json.loads(head[8:])["blocks"]}
    kept.write_bytes(signed(head + b"\n", lambda head: head | {"blocks": blocks}) + row)
    assert load_indexed(path).entries() == expected


def test_what_is_no_file_is_no_index(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path / "r", [make_entry()])
    kept = index.index_path(path)
    kept.parent.mkdir(parents=True)
    os.mkfifo(kept)
    assert len(load_indexed(path).entries()) == 1
    kept.unlink()
    kept.mkdir()
    assert len(load_indexed(path).entries()) == 1
    assert index.forgotten_indexes() == (kept,)


def test_index_of_another_code_version_falls_back_to_yaml(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path / "r", [make_entry()])
    expected = load_indexed(path).entries()
    kept = index.index_path(path)
    head, rows = kept.read_bytes().split(b"\n", 1)
    rows = rows.replace(b'"spills"', b'"spilled"')
    blocks = {key: [len(rows), index.zlib.crc32(rows)] for key in json.loads(head[8:])["blocks"]}
    kept.write_bytes(signed(head + b"\n", lambda head: head | {"blocks": blocks}) + rows)
    assert load_indexed(path).entries() == expected


def test_cache_that_cannot_be_written_is_harmless(tmp_path, make_entry, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "file" / "cache"))
    (path,) = write_entries(tmp_path / "r", [make_entry()])
    assert len(load_indexed(path).entries()) == 1


def test_search_order(tmp_path, monkeypatch, make_entry) -> None:
    models = [tmp_path / "model_a", tmp_path / "model_b"]
    for model in models:
        model.mkdir()
        export_bundle([make_entry()], model)
        use_bundle(model)
    monkeypatch.setenv("FLASHGEN_REGISTRY", os.pathsep.join(["/one", "/two.yaml"]))
    found = [(location.label, location.path) for location in search_locations(tmp_path / "mine")]
    assert found == [
        ("argument", tmp_path / "mine"),
        ("environment", Path("/one")),
        ("environment", Path("/two.yaml")),
        ("bundle", models[1] / "flashgen"),
        ("bundle", models[0] / "flashgen"),
        ("user", resources.user_registry_dir()),
        ("shipped", resources.shipped_registry_dir()),
    ]


def test_candidates_come_in_search_order_and_files_once(tmp_path, make_entry) -> None:
    (mine,) = write_entries(tmp_path / "mine", [make_entry(256)])
    write_entries(resources.user_registry_dir(), [make_entry(128), make_entry(64, head_dim=64)])
    locations = (Location(path=mine, label="environment"), *search_locations(tmp_path / "mine"))
    registry = load(locations)
    assert registry.issues == ()
    found = registry.candidates(make_entry().spec)
    assert [(c.location.label, c.entry.range.seqlen_q.lo) for c in found] == [("environment", 256), ("user", 128)]
    assert found[0].path == mine
    assert len(registry.entries()) == 3


def test_related_entries_share_the_family_and_nothing_else(tmp_path, make_entry) -> None:
    def entry(**change):
        made = make_entry()
        return dataclasses.replace(made, spec=dataclasses.replace(made.spec, **change))

    changes = {
        "window": {"mask": parse_mask("sliding_window(127,0)")},
        "softcap": {"softcap": True},
        "both": {"mask": parse_mask("causal&document"), "softcap": True, "bias": "input"},
        "function": {"mask": parse_mask("mask_mod('return q_idx > kv_idx')")},
        "dtype": {"dtype": DType.FP32},
        "tf32": {"dtype": DType.TF32},
        "dims": {"head_dim_v": 64},
        "varlen": {"varlen": True},
        "varlen window": {"varlen": True, "mask": parse_mask("sliding_window(127,0)")},
    }
    entries = {"itself": make_entry()} | {name: entry(**change) for name, change in changes.items()}
    write_entries(tmp_path, entries.values())
    for _ in range(2):  # parsed, then from the index
        registry = load([Location(path=tmp_path, label="argument")])

        def related(name: str, registry=registry) -> list[str]:
            found = [located.entry for located in registry.related(entries[name].spec)]
            assert len(set(found)) == len(found)
            return sorted(name for name, entry in entries.items() if entry in found)

        assert related("itself") == ["both", "function", "softcap", "window"]
        assert related("window") == ["both", "function", "itself", "softcap"]
        assert related("varlen") == ["varlen window"]
        assert related("tf32") == related("dims") == []
        lse = dataclasses.replace(entries["itself"].spec, lse=True, sinks=True)
        assert len(registry.related(lse)) == 4
        assert [located.entry for located in registry.candidates(lse)] == [entries["itself"]]


def test_missing_place_is_an_issue_only_if_somebody_named_it(tmp_path) -> None:
    issues = load(search_locations(tmp_path / "nowhere")).issues
    assert [issue.path for issue in issues] == [tmp_path / "nowhere"]


def test_damage_beside_sound_files_is_reported_and_skipped(tmp_path, make_entry) -> None:
    folder = tmp_path / "r"
    write_entries(folder, [make_entry()])
    (folder / "broken.yaml").write_text("format: 1\nentries: [")
    registry = load([Location(path=folder, label="argument")])
    assert len(registry.entries()) == 1
    assert [issue.path.name for issue in registry.issues] == ["broken.yaml"]


def test_bundles_latest_first_once_and_counted(tmp_path, make_entry) -> None:
    models = [tmp_path / "a", tmp_path / "b"]
    for model in models:
        model.mkdir()
        (written,) = export_bundle([make_entry()], model)
        assert written == model / "flashgen" / NAME
    start = generation()
    for model in (models[0], models[1], models[0]):
        assert use_bundle(model) == model / "flashgen"
    assert [loc.path.parent for loc in search_locations() if loc.label == "bundle"] == models
    assert generation() == start + 3
    clear_bundles()
    assert not [loc for loc in search_locations() if loc.label == "bundle"]
    assert generation() == start + 4


def test_bundle_without_usable_entries_is_refused(tmp_path, make_entry) -> None:
    with pytest.raises(RegistryError, match="no registry file"):
        use_bundle(tmp_path)
    (path,) = export_bundle([make_entry()], tmp_path)
    path.write_text("format: 2\n")
    with pytest.raises(RegistryError, match=r"no usable entry.*yaml:1: .*format is 2"):
        use_bundle(tmp_path)
    assert not [loc for loc in search_locations() if loc.label == "bundle"]
    with pytest.raises(RegistryError, match="no such folder"):
        export_bundle([make_entry()], tmp_path / "absent")


def test_writing_entries_makes_earlier_lookups_stale(tmp_path, make_entry) -> None:
    before = generation()
    write_entries(tmp_path, [make_entry()])
    assert generation() > before


def _load(*paths: Path) -> Registry:
    return load([Location(path=path, label="argument") for path in paths])


def test_fingerprint_tells_contents_and_not_places(tmp_path, make_entry) -> None:
    write_entries(tmp_path / "a", [make_entry(128), make_entry(256)])
    write_entries(tmp_path / "b" / "c", [make_entry(256), make_entry(128)])
    write_entries(tmp_path / "d", [make_entry(128), make_entry(256, median_us=99.0)])
    (tmp_path / "empty").mkdir()
    assert re.fullmatch("[0-9a-f]{16}", _load(tmp_path / "a").fingerprint())
    for _ in range(2):  # parsed, then from the index
        same = _load(tmp_path / "a").fingerprint()
        assert _load(tmp_path / "b" / "c").fingerprint() == same
        # What repeats an earlier file, or holds nothing, is never consulted.
        assert _load(tmp_path / "empty", tmp_path / "a", tmp_path / "b" / "c").fingerprint() == same
        assert _load(tmp_path / "d").fingerprint() != same
        both = _load(tmp_path / "a", tmp_path / "d").fingerprint()
        assert len({same, both, _load(tmp_path / "d", tmp_path / "a").fingerprint()}) == 3
    assert _load().fingerprint() == _load(tmp_path / "empty").fingerprint()


def test_fingerprint_decodes_no_index_and_does_not_believe_a_damaged_one(tmp_path, make_entry, monkeypatch) -> None:
    (path,) = write_entries(tmp_path, [make_entry(128), make_entry(256, head_dim=64)])
    parsed = _load(path).fingerprint()
    with monkeypatch.context() as patched:
        patched.setattr(index, "_parse_yaml", _refuse_yaml)
        patched.setattr(index, "entry_from_dict", _refuse_yaml)
        assert _load(path).fingerprint() == parsed
    kept = index.index_path(path)
    kept.write_bytes(kept.read_bytes().replace(b'"num_warps":8', b'"num_warps":4', 1))
    registry = _load(path)
    assert registry.fingerprint() == parsed
    assert len(registry.entries()) == 2
    # A lookup that has decoded a part changes nothing.
    registry = _load(path)
    registry.candidates(make_entry().spec)
    assert registry.fingerprint() == parsed


def test_only_files_that_hold_entries_have_a_digest(tmp_path, make_entry) -> None:
    (path,) = write_entries(tmp_path, [make_entry()])
    (tmp_path / "broken.yaml").write_text("format: 1")
    (told,) = _load(tmp_path).file_digests()
    assert (told.path, told.label) == (path, "argument")


def test_odd_places_are_issues_and_nothing_is_raised(tmp_path, make_entry) -> None:
    folder = tmp_path / "r"
    write_entries(folder, [make_entry()])
    (folder / "circle.yaml").symlink_to("circle.yaml")
    (folder / "nowhere.yaml").symlink_to(tmp_path / "absent")
    (folder / "folder.yaml").mkdir()
    os.mkfifo(folder / "pipe.yaml")
    (folder / "evil\x1b[31m\n.yaml").write_text("no")
    registry = _load(folder, tmp_path / "a\0b", tmp_path / ("x" * 5000), folder / "circle.yaml")
    assert len(registry.entries()) == 1
    assert len(registry.file_digests()) == 1
    assert sorted(issue.path.name[:5] for issue in registry.issues) == [
        *("a\0b", "circl", "circl", "evil\x1b", "folde", "nowhe", "pipe.", "xxxxx")
    ]
    assert all(str(issue).isprintable() for issue in registry.issues)


@pytest.mark.skipif(os.geteuid() == 0, reason="os.geteuid() == 0: no folder is closed to root")
def test_a_closed_folder_is_an_issue(tmp_path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert [issue.path for issue in _load(closed / "r").issues] == [closed / "r"]
