"""A user's mistake is one line in Prefect's log, too, as it is on the command line; every other failure keeps its
traceback."""

from __future__ import annotations

import logging

from svd.stage import UserError


class _OneLine(logging.Filter):
    """Takes the traceback off a record that reports a UserError; the record's own text names it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True: every record is logged."""
        if isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], UserError):
            record.exc_info = None
        return True


_FILTER = _OneLine()


def hide_tracebacks() -> None:
    """Apply to Prefect's loggers of flow and task runs; a second time it does nothing."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_FILTER)
