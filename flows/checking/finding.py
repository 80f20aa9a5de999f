"""The outcome of one probe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Whether a probe passed, and one line of what was seen."""

    probe: str
    passed: bool
    seen: str
