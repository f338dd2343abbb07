"""Studies on a PostgreSQL server, which the tests start: resumed, reported, and kept when the server goes away."""

from __future__ import annotations

import pytest

from flashgen.cli.configs import short_config
from flashgen.errors import FlashgenError
from flashgen.registry import load
from flashgen.report import read_report
from flashgen.tuning import SilentObserver
from flashgen.tuning.journal import open_storage

TRIALS = 6


def test_a_study_on_a_server_is_resumed_and_reported(bench, server):
    first = bench.run(trials=TRIALS, study=server.url).results[0]
    assert len(first.trials) == TRIALS
    assert first.entry is not None
    calls = len(bench.calls("evaluate"))
    again = bench.run(trials=TRIALS + 2, study=server.url).results[0]
    assert [trial.resumed for trial in again.trials] == [True] * TRIALS + [False] * 2
    # In the order of their numbers, not of their ends.
    assert {trial.config for trial in again.trials[:TRIALS]} == {trial.config for trial in first.trials}
    assert len(bench.calls("evaluate")) == calls + 2
    (told,) = read_report(server.url, registry=load([]), short_name=short_config).problems
    assert told.problem == bench.problem


class Stopping(SilentObserver):
    """Stops the server after some trials."""

    def __init__(self, server, after: int) -> None:
        self._server, self._left = server, after

    def trial(self, record, best, done, seconds_left):
        self._left -= 1
        if self._left == 0:
            self._server.stop()


def test_a_server_that_goes_away_costs_no_finished_trial(bench, server):
    with pytest.raises(FlashgenError, match=r"the study cannot be written .* the trials so far are kept"):
        bench.run(trials=TRIALS, study=server.url, workers=1, observer=Stopping(server, after=3))
    with pytest.raises(FlashgenError, match=r"cannot be opened|cannot be written") as caught:
        bench.run(trials=TRIALS, study=server.url)
    assert "connection" in str(caught.value)
    server.start()
    resumed = [trial.resumed for trial in bench.run(trials=TRIALS, study=server.url).results[0].trials]
    assert resumed == [True] * 3 + [False] * (TRIALS - 3)


def test_a_study_in_use_is_refused_and_free_again_afterwards(bench, server):
    with open_storage(server.url), pytest.raises(FlashgenError, match="another flashgen tune is using the study"):
        bench.run(trials=TRIALS, study=server.url)
    assert bench.calls("compile") == []
    assert len(bench.run(trials=TRIALS, study=server.url).results[0].trials) == TRIALS


def test_passwords_are_shown_to_nobody(bench, server):
    secret = server.url.replace("flashgen@", "flashgen:secret@")
    observer = Started()
    with open_storage(server.url), pytest.raises(FlashgenError) as caught:
        bench.run(trials=TRIALS, study=secret, observer=observer)
    assert "flashgen:***@" in str(caught.value)
    assert "flashgen:***@" in observer.study
    assert "secret" not in str(caught.value) + observer.study


class Started(SilentObserver):
    """Keeps what it is told of the study."""

    study = ""

    def run_started(self, target, problems, study, gpu):
        self.study = study
