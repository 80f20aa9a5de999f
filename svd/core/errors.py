"""The error that is shown to a user as one line."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, in which file, and what to do. Shown without a traceback.

    For example `UserError("frames.txt: holds no prompt; write one per line")`.
    """
