"""join: what it asks for, prints, and how it exits."""

from __future__ import annotations

import json
import typing

import pytest

import flashgen.tuning
from flashgen.errors import FlashgenError
from flashgen.tuning.events import JoinReport


@pytest.fixture
def fake_join(monkeypatch: pytest.MonkeyPatch) -> typing.Callable[[JoinReport], dict[str, object]]:
    """A function that makes `flashgen.tuning.join` return a report, and gives the arguments that it was called with."""

    def install(report: JoinReport) -> dict[str, object]:
        seen: dict[str, object] = {}

        def join(study: str, *, say: typing.Callable[[str], None], **options: object) -> JoinReport:
            seen.update(options, study=study)
            say("waiting for a run")
            return report

        monkeypatch.setattr(flashgen.tuning, "join", join, raising=False)
        return seen

    return install


def test_done(run, fake_join):
    seen = fake_join(JoinReport(measured=3, compiled=2, rejected=1))
    result = run("join", "--study", "shared/study", "--device", "cpu", "--workers", "7")
    assert result.exit_code == 0
    assert result.stdout == "configs: measured 3, compiled 2, rejected 1, ignored 0, given back 0\n"
    assert result.stderr == "waiting for a run\n"
    assert seen == {"study": "shared/study", "device": "cpu", "workers": 7}


def test_interrupted_is_exit_130_and_json_is_one_document(run, fake_join):
    fake_join(JoinReport(given_back=2, interrupted=True))
    result = run("join", "--study", "x", "--json")
    assert result.exit_code == 130
    assert "the run goes on without this machine" in result.stderr
    document = json.loads(result.stdout)
    assert document["interrupted"]
    assert document["configs"]["given_back"] == 2


def test_a_study_is_needed_and_a_refusal_is_exit_1(run, monkeypatch):
    assert run("join").exit_code == 2

    def join(study: str, **options: object) -> JoinReport:
        raise FlashgenError("this machine cannot help: its flashgen is other code")

    monkeypatch.setattr(flashgen.tuning, "join", join, raising=False)
    result = run("join", "--study", "x")
    assert (result.exit_code, result.stderr) == (1, "error: this machine cannot help: its flashgen is other code\n")


def test_sqlite_is_refused(run, tmp_path):
    result = run("join", "--study", f"sqlite:///{tmp_path / 'study.db'}", "--device", "cpu")
    assert result.exit_code == 2
    assert "a journal file on a shared folder, or a PostgreSQL database" in result.stderr
