"""Model cards, read as the hub reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard


def read_card(folder: Path) -> dict[str, Any]:
    """The front matter of the card in a folder; fails when the hub's own reader has anything against it."""
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=False)
    assert card.text.lstrip().startswith("# ") and str(folder.parent) not in card.content
    values: dict[str, Any] = card.data.to_dict()
    return values
