"""The page: complete, escaped, fetching nothing, and legible in a browser; the charts as files for print."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import typing
import warnings
import wsgiref.util
import xml.etree.ElementTree
from pathlib import Path

import matplotlib.image
import numpy
import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from flashgen.errors import InputError
from flashgen.registry import RegistryEntry
from flashgen.report import StudyReport, render_page, write_charts, write_page
from flashgen.spec import parse_problem

ROOT = Path(__file__).parents[2]
OTHER = "b=1 hq=2 hkv=2 sq=512 sk=512 forward d=64 full bf16"
HOSTILE = "b=1 forward <script>alert(1)</script> $x_1"
FETCHING = ("src", "srcset", "data", "action", "poster", "background", "formaction", "ping")


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(full: tuple[StudyReport, RegistryEntry]) -> str:
    """The page of `full`."""
    return render_page(full[0])


def test_the_page_holds_every_part(full, page):
    report, entry = full
    problem = report.problems[0]
    elements = Elements(page)
    for part in (
        str(entry.config),
        "NVIDIA H200 (sm_90)",
        "measured",
        "cudnn",
        "1.17x",
        f"{entry.performance.median_us:g} µs",
        f"{problem.tflops(entry.performance.median_us):.4g} TFLOP/s",
        "Best so far, by trial",
        "Best so far, by time",
        "Timing of winner and runners-up",
        "Roofline",
        "of the compute roof",
        "What matters",
        "registers of a thread",
        "limited by",
        "bytes of shared memory of 232448 and alike",
        "block_n",
        "1 trial under way",
        "No config passed: all 4 trials were rejected",
    ):
        assert part in re.sub(r"\s+", " ", elements.text), part
    drawings = [attributes["aria-label"] for tag, attributes in elements.found if tag == "svg"]
    assert len(drawings) > 10
    assert all(drawings)


def test_the_page_fetches_nothing_and_runs_nothing(page):
    found = Elements(page).found
    assert not {tag for tag, _ in found} & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    for _, attributes in found:
        assert not [name for name in attributes if name in FETCHING or name.startswith("on")]
        links = [attributes.get(name) or "#" for name in ("href", "xlink:href")]
        assert all(link.startswith("#") for link in links)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", page))
    addresses = set(re.findall(r"""https?://[^"'\s<>]+""", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert re.findall(r"""(\S+)=["']https?:""", page)
    assert all(name.startswith("xmlns") for name in re.findall(r"""(\S+)=["']https?:""", page))


def test_ids_of_the_charts_do_not_clash(page):
    referred = set(re.findall(r'xlink:href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    for name in referred:
        assert page.count(f'id="{name}"') == 1, name


def test_colours_are_those_of_the_page(page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--winner)" in drawings
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) == set()
    assert "prefers-color-scheme: dark" in page


def test_texts_of_a_study_are_escaped(studies):
    studies.add(12, text=HOSTILE)
    report = studies.report()
    page = render_page(report)
    assert "<script" not in page
    assert "<img" not in page
    text = Elements(page).text
    assert "<script>alert(1)</script>" in text
    assert '<img src=x onerror="alert(2)">' in text
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.etree.ElementTree.fromstring(drawing)


def test_a_study_without_trials_has_a_page(studies):
    studies.add(0)
    assert "No trial has ended yet" in render_page(studies.report())


def test_many_problems_have_an_overview(studies):
    studies.add(3)
    studies.add(3, problem=parse_problem(OTHER))
    page = render_page(studies.report())
    assert "Roofline of the winners" in page
    assert [page.count(f'href="#problem-{index}"') for index in (1, 2)] == [1, 1]
    assert "Roofline of the winners" not in render_page(studies.report(OTHER))


def test_charts_for_print(full, tmp_path):
    files = write_charts(full[0], tmp_path / "figures")
    assert sorted(files) == sorted((tmp_path / "figures").iterdir())
    assert all(re.fullmatch(r"[A-Za-z0-9_=.-]+\.png", path.name) for path in files)
    (roofline,) = (path for path in files if "roofline" in path.name)
    height, width, _ = matplotlib.image.imread(roofline).shape
    assert width == pytest.approx(5.6 * 300, abs=2)
    assert height > width / 3


def test_the_page_never_replaces_the_study(studies):
    studies.add(1)
    data = studies.path.read_bytes()
    with pytest.raises(InputError, match="is the study; name another file"):
        write_page(studies.report(), studies.path)
    assert studies.path.read_bytes() == data


def test_a_page_that_cannot_be_written_is_said(studies, tmp_path):
    studies.add(1)
    with pytest.raises(InputError, match=r"cannot be written .* name another place"):
        write_page(studies.report(), tmp_path / "missing" / "report.html")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_charts(studies.report(), tmp_path / "file")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="shutil.which('chromium') is None")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_shows_the_page(page, tmp_path, scheme):
    file, picture = tmp_path / "report.html", tmp_path / "page.png"
    file.write_text(page, encoding="utf-8")
    subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'browser'}",
            f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
            "--window-size=1280,2400",
            f"--screenshot={picture}",
            file.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, 1280)
    brightness = pixels.mean(axis=2)
    # What most of the page is, and ink that can be told from it everywhere down the page.
    paper = float(numpy.median(brightness))
    assert paper < 0.2 if scheme == "dark" else paper > 0.9
    for band in numpy.array_split(brightness, 8):
        assert float(abs(band - paper).max()) > 0.5
    colours = numpy.unique((pixels.reshape(-1, 3) * 255).astype(numpy.uint8), axis=0)
    assert len(colours) > 200


def test_optuna_dashboard_opens_the_study(studies):
    dashboard: typing.Any = pytest.importorskip("optuna_dashboard", reason="optuna_dashboard is not importable")
    studies.add(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(studies.path)))
    status, body = _get(dashboard.wsgi(storage), "/api/studies")
    assert status.startswith("200")
    names = [summary["study_name"] for summary in json.loads(body)["study_summaries"]]
    assert names == optuna.get_all_study_names(storage)
    assert len(names) == 1


def _get(application: typing.Any, path: str) -> tuple[str, bytes]:
    environ: dict[str, typing.Any] = {}
    wsgiref.util.setup_testing_defaults(environ)
    environ["PATH_INFO"] = path
    statuses: list[str] = []
    body = b"".join(application(environ, lambda status, headers, error=None: statuses.append(status)))
    return statuses[0], body


def test_matplotlib_is_loaded_by_reports_alone():
    code = (
        "import sys, flashgen, flashgen.cli, flashgen.tuning.session\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import flashgen.report\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
