"""One HTML page about one or several run folders; knows nothing about training."""

from __future__ import annotations

from stableopt.report.page import write_report
from stableopt.report.runs import CertificateSummary, Run, read_run

__all__ = ["CertificateSummary", "Run", "read_run", "write_report"]
