"""One HTML page about one or several run folders, and a run in the terminal; knows nothing about training."""

from __future__ import annotations

from stableopt.report.history import Curve, History, trust_band
from stableopt.report.live import LiveView
from stableopt.report.page import write_report
from stableopt.report.runs import CertificateSummary, Run, read_run

__all__ = ["CertificateSummary", "Curve", "History", "LiveView", "Run", "read_run", "trust_band", "write_report"]
