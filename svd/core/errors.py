"""The error that is shown to a user as one line."""

from __future__ import annotations

from svd.core.addresses import public_text


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, in which file, and what to do. Shown without a traceback.

    Credentials in the addresses that it names are left out. For example
    `UserError("frames.txt: holds no prompt; write one per line")`.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(public_text(one) if isinstance(one, str) else one for one in args))
