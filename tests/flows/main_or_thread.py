"""Where the work of a stage is done: in a command's main thread, or in a thread of Prefect."""

from __future__ import annotations

import threading
from collections.abc import Callable


def do_in(where: str, work: Callable[[], None]) -> None:
    """Call `work` in the `main` thread or in another one (`thread`), which must end within a minute."""
    if where == "main":
        work()
        return
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
