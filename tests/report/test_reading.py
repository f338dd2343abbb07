"""What a report says of a study, and that it leaves the study alone."""

from __future__ import annotations

import json
import math
import os
import typing

import optuna
import pytest

from flashgen.errors import InputError
from flashgen.registry import load
from flashgen.report import read_report, report_document
from flashgen.spec import parse_problem
from flashgen.tuning.journal import open_storage

PROBLEM = "b=4 hq=16 hkv=16 sq=4096 sk=4096 forward d=128 causal bf16"
OTHER = "b=1 hq=2 hkv=2 sq=512 sk=512 forward d=64 full bf16"


def read(place: object, *problems: str) -> typing.Any:
    return read_report(str(place), registry=load(()), short_name=str, problems=problems)


def test_the_trials_and_the_best_so_far(studies):
    told = studies.add(12)
    (problem,) = studies.report().problems
    assert (problem.text, problem.device, problem.timing, problem.origin) == (
        PROBLEM,
        "NVIDIA H200",
        "cold-l2",
        "measured",
    )
    assert problem.versions == {"triton": "3.6.0", "driver": "580.1"}
    assert [trial.config for trial in problem.trials] == [tried.config for tried in told]
    best = math.inf
    for tried, shown in zip(told, problem.best_so_far(), strict=True):
        best = min(best, tried.timing.median_us) if tried.passed else best
        assert shown == best
    elapsed = [trial.elapsed_s for trial in problem.trials]
    assert elapsed == sorted(elapsed)
    assert elapsed[0] >= 0


def test_without_an_entry_the_fastest_of_the_search_wins(studies):
    told = studies.add(12)
    (problem,) = studies.report().problems
    assert problem.entry is None
    assert problem.baseline is None
    fastest = min((tried for tried in told if tried.passed), key=lambda tried: tried.timing.median_us)
    assert problem.winner.trial.config == fastest.config
    assert problem.winner.us == fastest.timing.median_us
    assert [f.us for f in problem.finalists] == sorted(f.us for f in problem.finalists)


def test_the_entry_of_the_search_says_what_won_and_what_stood_beside_it(studies):
    entry = studies.enter(studies.add(30))
    (problem,) = studies.report().problems
    assert problem.winner.trial.config == entry.config
    assert problem.winner.us == entry.performance.median_us
    assert problem.winner.differences == {}
    assert problem.baseline == ("cudnn", entry.performance.baseline_us)
    raced = {f.trial.config: f.raced_us for f in problem.finalists}
    assert [raced[runner_up.config] for runner_up in entry.runners_up] == [r.median_us for r in entry.runners_up]
    assert all(f.differences for f in problem.finalists[1:])
    assert problem.winner.residency.programs >= 1
    assert problem.roof.bound == "compute"
    assert problem.roof.tflops == pytest.approx(989)
    assert problem.tflops(problem.winner.us) == pytest.approx(entry.performance.tflops, rel=1e-3)


def test_an_entry_of_another_driver_is_not_this_search(studies):
    told = studies.add(12)
    studies.enter(told)
    # The same problem under another driver is another study.
    text = studies.path.read_text().replace("driver 580.1", "driver 999")
    studies.path.write_text(text)
    (problem,) = studies.report().problems
    assert problem.entry is None


def test_parameters_count_every_trial_once(studies):
    told = studies.add(40)
    (problem,) = studies.report().problems
    (block_n,) = (parameter for parameter in problem.parameters if parameter.name == "block_n")
    assert sum(value.tried for value in block_n.values) == len(told)
    assert sum(value.passed for value in block_n.values) == sum(tried.passed for tried in told)
    for value in block_n.values:
        times = [t.timing.median_us for t in told if t.passed and t.config.as_dict()["block_n"] == value.value]
        assert value.best_us == min(times, default=None)
    assert not {parameter.name for parameter in problem.parameters} & set(problem.fixed)


def test_importances_need_trials_enough(studies):
    studies.add(10)
    (problem,) = studies.report().problems
    assert problem.importances.shares == {}
    assert "too few" in problem.importances.note
    studies.add(20)
    (problem,) = studies.report().problems
    assert sum(problem.importances.shares.values()) == pytest.approx(1)
    assert "rough" in problem.importances.note


def test_rejections_are_grouped_whatever_their_numbers(studies):
    told = studies.add(30)
    (problem,) = studies.report().problems
    assert [(r.stage, len(r.trials)) for r in problem.rejections] == [
        (stage, sum(getattr(t.record.result, "stage", "") == stage for t in told))
        for stage in ("resources", "accuracy")
    ]
    assert problem.rejections[0].reason == next(
        t.record.result.reason for t in told if not t.passed and t.record.result.stage == "resources"
    )


def test_one_problem_of_several(studies):
    studies.add(4)
    studies.add(4, problem=parse_problem(OTHER))
    assert [problem.text for problem in studies.report().problems] == [PROBLEM, OTHER]
    # However it is written.
    assert [p.text for p in studies.report("b=1 h=2 s=512 d=64").problems] == [OTHER]
    with pytest.raises(InputError, match=r"does not hold b=1 .* d=32 .*; it holds: b=1 .*; b=4 "):
        studies.report("b=1 h=2 s=512 d=32")


def test_a_predicted_study_says_so(studies):
    studies.add(4, timing="occupancy-roofline-model")
    assert studies.report().problems[0].origin == "predicted"


def test_a_mask_with_a_bar_is_part_of_the_problem(studies):
    text = "b=1 hq=2 hkv=2 sq=512 sk=512 forward d=64 causal | prefix_lm(64) bf16"
    studies.add(2, text=text)
    assert studies.report().problems[0].text == text


def test_a_study_in_use_is_read_and_left_as_it_is(studies):
    studies.add(5, leave_open=2)
    # A line that is being written.
    with open(studies.path, "ab") as file:
        file.write(b'{"op_code":4,"worker_id":"')
    folder, data, stat = studies.path.parent, studies.path.read_bytes(), studies.path.stat()
    files = sorted(folder.rglob("*"))
    os.symlink(studies.path, f"{studies.path}.lock")
    try:
        (problem,) = read(studies.path).problems
    finally:
        os.unlink(f"{studies.path}.lock")
    assert len(problem.trials) == 5
    assert problem.unfinished == 2
    assert studies.path.read_bytes() == data
    assert studies.path.stat().st_mtime_ns == stat.st_mtime_ns
    assert sorted(folder.rglob("*")) == files


def test_a_run_that_holds_the_study_does_not_hinder_the_report(studies):
    studies.add(3)
    with open_storage(str(studies.path)):
        assert len(studies.report().problems[0].trials) == 3


def test_a_study_without_trials_is_a_report(studies):
    studies.add(0)
    (problem,) = studies.report().problems
    assert problem.trials == ()
    assert problem.winner is None


def test_a_missing_study_is_refused_and_not_made(tmp_path):
    (tmp_path / "other.journal").touch()
    with pytest.raises(InputError, match=r"there is no study .*; beside it: .*other\.journal; .*flashgen tune"):
        read(tmp_path / "study.journal")
    with pytest.raises(InputError, match="there is no study"):
        read(f"sqlite:///{tmp_path / 'study.db'}")
    assert [path.name for path in tmp_path.iterdir()] == ["other.journal"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b"\x00\xff garbage\n",
        lambda data: data.replace(b"\n", b"\n{]\n", 2),
        lambda data: data + b'{"no":"record"}\n',
        lambda data: b"model: weights\n",
        lambda data: data.replace(b"max_error", b"other_key"),
        lambda data: data.replace(b'\\"median_us\\": ', b'\\"median_us\\": -'),
    ],
    ids=["garbage at the end", "in the middle", "no record", "another file", "other keys", "negative times"],
)
def test_a_damaged_study_is_refused_and_left_alone(studies, damage):
    studies.add(3)
    data = damage(studies.path.read_bytes())
    studies.path.write_bytes(data)
    with pytest.raises(InputError, match=r"cannot be read.*left as it is|is damaged.*move it away"):
        studies.report()
    assert studies.path.read_bytes() == data


def test_a_study_of_someone_else_is_named_or_refused(studies):
    with open_storage(str(studies.path)) as storage:
        optuna.create_study(storage=storage, study_name="learning rate")
    with pytest.raises(InputError, match="holds no problem of flashgen's"):
        studies.report()
    studies.add(2)
    assert studies.report().foreign == ("learning rate",)


def test_a_database_is_read_and_never_written(studies, tmp_path):
    studies.add(4)
    path = tmp_path / "copy of.db"
    url = f"sqlite:///{path}"
    with open_storage(str(studies.path)) as source, open_storage(url) as target:
        (name,) = optuna.get_all_study_names(source)
        optuna.copy_study(from_study_name=name, from_storage=source, to_storage=target)
    data = path.read_bytes()
    assert len(read(url).problems[0].trials) == 4
    assert path.read_bytes() == data
    (tmp_path / "empty.db").touch()
    with pytest.raises(InputError, match="cannot be read"):
        read(f"sqlite:///{tmp_path / 'empty.db'}")
    assert (tmp_path / "empty.db").read_bytes() == b""


def test_passwords_are_not_shown():
    with pytest.raises(InputError) as caught:
        read("nosuch://user:secret@host/database")
    assert "secret" not in str(caught.value)


def test_the_document_is_json(studies):
    studies.enter(studies.add(25))
    studies.add(2, problem=parse_problem(OTHER), rejects_all=True)
    document = json.loads(json.dumps(report_document(studies.report()), allow_nan=False))
    first, second = document["problems"]
    assert first["winner"]["raced_us"] == first["entry"]["performance"]["median_us"]
    assert len(first["all_trials"]) == first["trials"] == 25
    assert second["winner"] is None
