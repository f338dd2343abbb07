"""The report as plain values for JSON."""

from __future__ import annotations

import dataclasses

from flashgen.measure import Rejected
from flashgen.report.data import Finalist, ProblemReport, StudyReport, Trial


def report_document(report: StudyReport) -> dict[str, object]:
    """Return everything that the page says, and every trial."""
    return {
        "study": report.place,
        "problems": [_problem_document(problem) for problem in report.problems],
        "foreign_studies": list(report.foreign),
    }


def _problem_document(report: ProblemReport) -> dict[str, object]:
    baseline = report.baseline
    return {
        "problem": report.text,
        "device": report.device,
        "timing": report.timing,
        "origin": report.origin,
        "versions": report.versions,
        "trials": len(report.trials),
        "unfinished": report.unfinished,
        "winner": _finalist_document(report, report.winner) if report.winner else None,
        "entry": report.entry.as_dict() if report.entry else None,
        "entry_file": report.entry_file or None,
        "baseline": {"name": baseline[0], "median_us": baseline[1]} if baseline else None,
        "untuned": _trial_document(report.untuned) if report.untuned else None,
        "finalists": [_finalist_document(report, finalist) for finalist in report.finalists],
        "roof": {**dataclasses.asdict(report.roof), "tflops": report.roof.tflops, "bound": report.roof.bound}
        if report.roof
        else None,
        "parameters": [dataclasses.asdict(parameter) for parameter in report.parameters],
        "fixed": report.fixed,
        "importances": dataclasses.asdict(report.importances),
        "rejected": [dataclasses.asdict(rejection) for rejection in report.rejections],
        "all_trials": [_trial_document(trial) for trial in report.trials],
        "best_so_far_us": list(report.best_so_far()),
    }


def _finalist_document(report: ProblemReport, finalist: Finalist) -> dict[str, object]:
    return {
        **_trial_document(finalist.trial),
        "raced_us": finalist.raced_us,
        "tflops": report.tflops(finalist.us),
        "tflops_is_upper_bound": report.is_upper_bound,
        "residency": dataclasses.asdict(finalist.residency) if finalist.residency else None,
        "differences": finalist.differences,
    }


def _trial_document(trial: Trial) -> dict[str, object]:
    key = "rejected" if isinstance(trial.result, Rejected) else "timing"
    return {
        "number": trial.number,
        "name": trial.name,
        "config": trial.config.as_dict(),
        "resources": dataclasses.asdict(trial.resources) if trial.resources else None,
        "max_error": trial.max_error,
        "allowed_error": trial.allowed_error,
        "elapsed_s": trial.elapsed_s,
        key: dataclasses.asdict(trial.result),
    }
