"""How the files that are made from the table of stages are written: header and YAML, equal bytes always."""

from __future__ import annotations

from typing import Any

import yaml

HEADER = "made by `svd platform render`; edit flows/stages.py"


class _Plain(yaml.SafeDumper):
    """YAML without anchors: equal parts are written out, so that a change of one row is a change of a few lines."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: nothing is ever written as an alias."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list below its key, as people write them."""
        super().increase_indent(flow, False)


def file_text(head: str, content: dict[str, Any]) -> str:
    """Return a YAML file as text: the header, `head` as comment lines, and `content` in its order. Equal bytes always.

    Lists and mappings of the top level are set apart by empty lines.
    """
    text = "".join(f"# {line}\n" for line in (HEADER, *head.splitlines()))
    for key, value in content.items():
        part = yaml.dump({key: value}, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)
        text += f"\n{part}" if isinstance(value, list | dict) else part
    return text
