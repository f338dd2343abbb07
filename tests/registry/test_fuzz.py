"""Registry files, indexes, bundles and texts of masks come from others: none may raise, run code or cost much."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashgen.dispatch import select
from flashgen.errors import FlashgenError, RegistryError
from flashgen.registry import (
    FileContents,
    Location,
    RegistryEntry,
    clear_bundles,
    load,
    load_indexed,
    merge,
    read_file,
    use_bundle,
    write_entries,
)
from flashgen.registry.entry import digest_of
from flashgen.registry.index import index_path
from flashgen.registry.yaml_text import dump, readable
from flashgen.registry.yaml_tree import plain, read_tree
from flashgen.spec import parse_mask, parse_problem
from flashgen.spec.mods import parse_mod
from flashgen.target import Software, named_target

NAME = "nvidia_h200.forward.yaml"
MakeEntry = Callable[..., RegistryEntry]

# Folders are made once for all examples of a test: each example overwrites the file.
fuzzed = settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

_code_run: list[str] = []
_WATCHED = frozenset(
    ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")
)


@pytest.fixture(scope="module", autouse=True)
def _watch() -> None:
    # An audit hook stays for good; it only remembers.
    sys.addaudithook(lambda event, _: _code_run.append(event) if event in _WATCHED else None)


@pytest.fixture(autouse=True)
def _nothing_runs() -> typing.Iterator[None]:
    _code_run.clear()
    yield
    assert _code_run == []


def read(path: Path, data: bytes) -> FileContents:
    """Read a file of these bytes in every way, and check what must hold of any."""
    path.write_bytes(data)
    contents = read_file(path)
    lines = len(data.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    for issue in contents.issues:
        assert issue.path == path
        # A byte of UTF-8 text may be the last of NEL, LS or PS, which are line breaks to YAML.
        assert issue.line is None or 1 <= issue.line <= lines + data.count(b"\x85") + data.count(b"\xe2\x80")
        assert str(issue).isprintable()
        assert len(issue.reason) <= 600
    for _ in range(2):  # parsed, then from the index where there is one
        indexed = load_indexed(path)
        assert indexed.entries() == contents.entries
        assert indexed.issues == contents.issues
    assert path.read_bytes() == data
    if contents.entries:
        # What is believed can be written, read back and shown.
        readable(path, dump(contents.entries), contents.entries)
    return contents


SNIPPETS = st.sampled_from(
    [
        *(
            b"",
            b"\xff",
            b"\x00",
            b"\x1b[31m",
            b"\xef\xbb\xbf",
            b"\xc2\x85",
            b"\xe2\x80\xa8",
            b"\r\n",
            b"\r",
            b"\n",
            b"\t",
        ),
        *(
            b"{",
            b"}",
            b"[",
            b"]",
            b"- ",
            b": ",
            b"? ",
            b"&a ",
            b"*a",
            b"<<: ",
            b"! ",
            b"!!set ",
            b"!!binary ",
            b"!!int ",
        ),
        *(b"---\n", b"...\n", b"%YAML 1.1\n", b"%TAG ! x\n", b"# ", b"'", b'"', b"|\n", b">\n", b"@", b"`", b"~", b"="),
        *(
            b".nan",
            b".inf",
            b"-1",
            b"1e999",
            b"0x" + b"f" * 5000,
            b"1:" * 60 + b"1",
            b"9" * 5000,
            b"0b1",
            b"1_0",
            b"\\u0007",
        ),
        *(
            b"!!python/object/apply:os.system [x] ",
            b"!!python/name:os.system ",
            b"2026-11-22",
            b"yes",
            b"null",
            b"x" * 30_000,
        ),
    ]
)


@st.composite
def damages(draw: st.DrawFn, sound: bytes) -> bytes:
    """Draw the bytes of a sound file after a few accidents."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("flip", "cut", "snippet", "snippet", "repeat", "truncate", "swap")))
        length = draw(st.integers(0, 200))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "snippet":
            data[at : at + draw(st.integers(0, 8))] = draw(SNIPPETS)
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "swap":
            data[at : at + length] = data[at : at + length][::-1]
        elif draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


@pytest.fixture
def sound(make_entry: MakeEntry) -> tuple[RegistryEntry, ...]:
    return merge([make_entry(s) for s in (128, 256, 512)], ())


@fuzzed
@given(data=st.binary(max_size=3000) | st.text(max_size=1000).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path / NAME, data).entries == ()


@fuzzed
@given(draw=st.data())
def test_accidents_are_seen_and_entries_survive_or_are_reported(
    tmp_path: Path, sound: tuple[RegistryEntry, ...], draw: st.DataObject
) -> None:
    contents = read(tmp_path / NAME, draw.draw(damages(dump(sound))))
    assert set(contents.entries) <= set(sound)
    assert contents.issues or contents.entries == sound


@fuzzed
@given(draw=st.data())
def test_a_damaged_file_is_never_written(
    tmp_path: Path, sound: tuple[RegistryEntry, ...], make_entry: MakeEntry, draw: st.DataObject
) -> None:
    path = tmp_path / NAME
    data = draw.draw(damages(dump(sound)))
    if not read(path, data).issues:
        return
    with pytest.raises(RegistryError, match="left untouched"):
        write_entries(tmp_path, [make_entry(1024)])
    assert path.read_bytes() == data


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**63, 10**300, -1])
    | st.floats()
    | st.sampled_from([1e-320, 1e300, 1e30, 0.0, -0.0])
    | st.text(max_size=20)
    | st.sampled_from(["", "causal", "bf16", "~causal", "\x1b[31m", "\ud800", "\u2028", "x" * 201, "sm_90", "backward"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


def _places(content: object, here: tuple[int | str, ...] = ()) -> list[tuple[int | str, ...]]:
    """Return the way to every value inside a document."""
    children: list[tuple[int | str, object]] = []
    if isinstance(content, dict):
        children = list(content.items())
    elif isinstance(content, list):
        children = list(enumerate(content))
    return [place for key, value in children for place in ((*here, key), *_places(value, (*here, key)))]


@st.composite
def forgeries(draw: st.DrawFn, document: dict[str, typing.Any]) -> bytes:
    """Draw a document with other values in some places, its digests right: who made it knows how they are computed."""
    content = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(_places(content)))
        owner = content
        for step in way:
            owner = owner[step]
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if action == "replace":
            owner[last] = draw(VALUES)
        elif action == "remove":
            del owner[last]
        elif isinstance(owner, dict):
            owner[draw(st.text(max_size=10))] = draw(VALUES)
    entries = content.get("entries")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and "digest" in entry:
            body = {name: content.get(name) for name in ("device", "arch", "phase")}
            try:
                entry["digest"] = digest_of(body | {name: value for name, value in entry.items() if name != "digest"})
            except ValueError:
                continue
    return yaml.safe_dump(content, allow_unicode=draw(st.booleans())).encode(errors="surrogatepass")


@settings(fuzzed, max_examples=150)
@given(draw=st.data())
def test_a_forger_who_knows_the_digest_gets_no_further_than_the_schema(
    tmp_path: Path, sound: tuple[RegistryEntry, ...], draw: st.DataObject
) -> None:
    contents = read(tmp_path / NAME, draw.draw(forgeries(yaml.safe_load(dump(sound[:2])))))
    registry = load([Location(path=tmp_path, label="argument")])
    assert [located.entry for located in registry.entries()] == list(contents.entries)
    # What was believed may be no use, but the dispatcher lives with it.
    selection = select(
        parse_problem("b=4 hq=32 hkv=8 s=256 d=128 causal bf16"),
        named_target("H200"),
        registry=registry,
        software=Software(flashgen="0.1.0", triton="3.10", torch="2.13.0", driver="580.126.09"),
    )
    assert str(selection)
    ratio = selection.runner_up_ratio
    assert ratio is None or math.isfinite(ratio)
    for entry in contents.entries:
        assert math.isfinite(entry.performance.spread_us)
        assert str(entry.spec)


@fuzzed
@given(value=VALUES, as_entries=st.booleans())
def test_any_document(tmp_path: Path, value: object, as_entries: bool) -> None:
    head = {"format": 1, "device": "NVIDIA H200", "arch": "sm_90", "phase": "forward"}
    document = {**head, "entries": value} if as_entries else value
    contents = read(tmp_path / NAME, yaml.safe_dump(document).encode(errors="surrogatepass"))
    assert contents.entries == ()
    assert contents.issues or (as_entries and value == [])


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=50)


@fuzzed
@given(
    value=st.recursive(
        PLAIN,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
        max_leaves=9,
    ),
    flow=st.sampled_from([True, False, None]),
)
def test_sound_text_reads_as_yaml_does(value: object, flow: bool | None) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow)
    tree = read_tree(text)
    assert tree is not None
    assert plain(tree) == yaml.safe_load(text) == value


@fuzzed
@given(text=st.text("0123456789.eE+-_:xob~nulNa truefasyio=<!'", max_size=12))
def test_a_value_without_quotes_is_of_the_kind_that_yaml_says(text: str) -> None:
    try:
        # The two loaders differ in what `!` alone is.
        node = yaml.compose(f"- {text}", Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return
    if isinstance(node.value[0], yaml.ScalarNode):
        assert read_tree(f"- {text}").items[0].tag == node.value[0].tag


@fuzzed
@given(draw=st.data())
def test_a_damaged_index_never_changes_an_answer(
    tmp_path: Path, sound: tuple[RegistryEntry, ...], draw: st.DataObject
) -> None:
    path = tmp_path / NAME
    if not path.exists():
        write_entries(tmp_path, sound)
    load_indexed(path)
    index = index_path(path)
    index.write_bytes(draw.draw(damages(index.read_bytes())))
    indexed = load_indexed(path)
    assert indexed.candidates(sound[0].spec) == sound
    assert indexed.related(sound[0].spec) == ()
    assert indexed.entries() == sound
    assert load_indexed(path).digest() == indexed.digest()
    index.unlink(missing_ok=True)


@settings(fuzzed, max_examples=50)
@given(
    names=st.lists(st.text("abc.\x1b\n\ud800 -%'", min_size=1, max_size=6), min_size=1, max_size=3, unique=True),
    draw=st.data(),
)
def test_a_bundle_is_used_or_refused(
    tmp_path_factory: pytest.TempPathFactory, sound: tuple[RegistryEntry, ...], names: list[str], draw: st.DataObject
) -> None:
    model = tmp_path_factory.mktemp("model")
    (model / "flashgen").mkdir()
    for name in names:
        data = draw.draw(st.just(dump(sound)) | damages(dump(sound)) | st.binary(max_size=50))
        (model / "flashgen" / f"{name.encode(errors='replace').decode()}.yaml").write_bytes(data)
    refused = ""
    try:
        folder = use_bundle(model)
        registry = load([Location(path=folder, label="bundle")])
        found = {located.entry for located in registry.entries()}
        assert found
        assert found <= set(sound)
        assert all(str(issue).isprintable() for issue in registry.issues)
    except RegistryError as error:
        refused = str(error)
    finally:
        clear_bundles()
    assert refused == "" or refused.isprintable()


WORDS = st.sampled_from(
    [
        *(
            "causal",
            "full",
            "sliding_window",
            "prefix_lm",
            "document",
            "chunked",
            "mask_mod",
            "score_mod",
            "global_tokens",
        ),
        *(
            "(",
            ")",
            ",",
            "&",
            "|",
            "~",
            "'",
            '"',
            "=",
            "return ",
            "q_idx",
            "kv_idx",
            "score",
            "b",
            "h",
            " > ",
            " + ",
            "//",
        ),
        *(
            "[",
            "]",
            "1",
            "-1",
            "9" * 50,
            "1e999",
            "torch.where",
            "a if c else b",
            "lambda: 0",
            "import os",
            "; ",
            "\\n",
            "\n",
        ),
        *("ids='int32[b,any]'", "__import__('os').system('true')", "\x00", "\x1b", "\ud800", "align=top_left", "."),
    ]
)
TEXTS = st.lists(WORDS, max_size=15).map("".join) | st.text(max_size=60)


@settings(fuzzed, max_examples=500)
@given(text=TEXTS | TEXTS.map(lambda t: f"mask_mod({t!r})") | TEXTS.map(lambda t: f"score_mod('return score * ({t})')"))
def test_any_text_of_a_mask_or_score(text: str) -> None:
    for parse in (parse_mask, parse_mod):
        try:
            value = parse(text)
        except FlashgenError:
            continue
        assert parse(str(value)) == value


# A file of each that is as large as is read at all, or one of 1 MB and more that costs most.
HOSTILE = """
HEAD = b"format: 1\\ndevice: X\\narch: sm_90\\nphase: forward\\n"
HUGE = 8 * 2**20 - 200
files = {
    "aliases": b"a: &a [x]\\n" + HEAD + b"entries: [" + b"*a," * 350_000 + b"]",
    "laughs": b"".join(b"a%d: &a%d [%s]\\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 40)),
    "directives": b"".join(b"%%TAG !a%d! x\\n" % i for i in range(400_000)),
    "directives after a mark": b"\\xef\\xbb\\xbf" + b"".join(b"%%TAG !a%d! x\\n" % i for i in range(400_000)),
    "directives after a document": b"a\\n...\\n" + b"".join(b"%%TAG !a%d! x\\n" % i for i in range(400_000)),
    "directives after odd breaks": b"#\\xc2\\x85" + b"\\r".join(b"%%TAG !a%d! x" % i for i in range(400_000)),
    "documents": b"---\\n" * (HUGE // 4),
    "brackets": b"[" * HUGE,
    "braces": b"{a: " * (HUGE // 4),
    "dashes": b"- " * (HUGE // 2),
    "questions": b"? " * (HUGE // 2),
    "numbers": HEAD + b"entries: [" + b"1," * (HUGE // 2 - 50) + b"]",
    "fields": HEAD + b"entries: [{" + b",".join(b"k%d: 1" % i for i in range(600_000)) + b"}]",
    "entries": HEAD + b"entries:\\n" + b"- {a: 1}\\n" * 10_000,
    "hexadecimal": HEAD + b"entries:\\n" + (b"- {spec: 0x" + b"f" * 19_000 + b"}\\n") * 400,
    "base 60": HEAD + b"entries:\\n" + (b"- {spec: " + b":".join([b"9"] * 9_990) + b"}\\n") * 400,
    "quotes": b'"' + b"a\\n" * (HUGE // 2 - 1) + b'"',
    "comments": b"#" * HUGE,
    "colons": b"a:" * (HUGE // 2),
    "spaces": b" " * HUGE,
    "breaks": b"\\n" * HUGE,
    "tags": HEAD + b"entries: [" + b"!!python/object/apply:os.system [x]," * 9_000 + b"]",
    "lists": HEAD + b"entries:\\n" + (b"- [" + b"1," * 9_999 + b"]\\n") * 140,
}
import resource, sys
from pathlib import Path
from flashgen.registry import read_file
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
path = Path(sys.argv[1])
for name, data in files.items():
    path.write_bytes(data)
    contents = read_file(path)
    print(name, len(contents.entries), min(len(contents.issues), 1), sep=":")
    assert len(contents.issues) <= 101
"""


def test_hostile_files_cost_little(tmp_path: Path) -> None:
    # Under a limit of 1 GiB and 100 s for all of them; about 5 s is usual.
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, tmp_path / NAME], capture_output=True, text=True, timeout=200, check=False
    )
    _code_run.clear()
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(":", 2) for line in done.stdout.splitlines()]
    assert len(rows) == 23
    assert all(row[1:] == ["0", "1"] for row in rows), rows


def test_an_index_of_any_size_is_no_index(tmp_path: Path, sound: tuple[RegistryEntry, ...]) -> None:
    (path,) = write_entries(tmp_path, sound)
    load_indexed(path)
    with index_path(path).open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no room
    assert load_indexed(path).entries() == sound


def test_json_of_an_issue_is_plain(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(b'format: 1\n"\\e[31m\\u0085": 2\ndevice: x\narch: y\nphase: forward\nentries: []\n')
    (issue,) = read_file(path).issues
    assert json.dumps(issue.reason).isascii()
    assert "\x1b" not in issue.reason
    assert issue.line == 2
