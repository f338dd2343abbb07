"""A tuning study as one page: what was tried, what won, and why.

Importing this package imports matplotlib, which nothing else in flashgen does.
"""

from flashgen.report.data import ProblemReport, StudyReport
from flashgen.report.document import report_document
from flashgen.report.files import write_charts, write_page
from flashgen.report.page import render_page
from flashgen.report.reading import read_report

__all__ = [
    "ProblemReport",
    "StudyReport",
    "read_report",
    "render_page",
    "report_document",
    "write_charts",
    "write_page",
]
