"""A user's mistake in Prefect's log: its one line, without a traceback."""

from __future__ import annotations

import logging

from svd.core.errors import UserError


def _shorten(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if isinstance(error, UserError):
        record.exc_info = record.exc_text = None
        record.msg, record.args = "%s", (error,)
    return True


def shorten_mistakes() -> None:
    """Log a UserError in flows and tasks without its traceback; every other exception keeps it."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_shorten)
