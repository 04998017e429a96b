"""Where records go, and how they are read back."""

from __future__ import annotations

from stableopt.lyapunov.sinks.base import FileSink, Sink
from stableopt.lyapunov.sinks.chain import Chain, verify_chain
from stableopt.lyapunov.sinks.jsonl import JSONLSink, iter_records, last_step, read_records, truncate_records
from stableopt.lyapunov.sinks.memory import MemorySink
from stableopt.lyapunov.sinks.scalars import scalars
from stableopt.lyapunov.sinks.table import COLUMNS, CSVSink
from stableopt.lyapunov.sinks.tensorboard import ScalarWriter, TensorBoardSink
from stableopt.lyapunov.sinks.tracker import TrackerSink
from stableopt.lyapunov.sinks.wandb import ScalarLog, WandbSink

__all__ = [
    "COLUMNS",
    "CSVSink",
    "Chain",
    "FileSink",
    "JSONLSink",
    "MemorySink",
    "ScalarLog",
    "ScalarWriter",
    "Sink",
    "TensorBoardSink",
    "TrackerSink",
    "WandbSink",
    "iter_records",
    "last_step",
    "read_records",
    "scalars",
    "truncate_records",
    "verify_chain",
]
