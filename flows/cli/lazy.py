"""Groups of commands that are imported when one of their commands is asked for, so that `svd --help` is quick."""

from __future__ import annotations

import importlib
from collections.abc import MutableMapping
from typing import Any

import typer
from typer.core import TyperGroup


def lazy_group(target: str, help: str) -> typer.Typer:
    """Return a group with the commands of the typer app at `target` (`module:name`); `help` is shown by its parent.

    Example: `app.add_typer(lazy_group("flows.cli.stack:stack_app", "The local stack."), name="stack")`.
    """

    class Lazy(_LazyGroup):
        """The group whose commands are at `target`."""

    Lazy.target = target
    return typer.Typer(cls=Lazy, help=help, no_args_is_help=True)


class _LazyGroup(TyperGroup):
    """A group whose `commands` are imported at first use."""

    target: str
    _loaded: MutableMapping[str, Any] | None = None

    @property
    def commands(self) -> MutableMapping[str, Any]:  # type: ignore[override]
        """The commands by name."""
        if self._loaded is None:
            module, _, name = self.target.partition(":")
            self._loaded = typer.main.get_group(getattr(importlib.import_module(module), name)).commands
        return self._loaded

    @commands.setter
    def commands(self, value: MutableMapping[str, Any]) -> None:
        """Do nothing with what the parent class sets: there are no commands but those of the target."""
