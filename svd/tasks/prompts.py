"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

from svd.core.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a text file, one per line; blank lines and lines that begin with # are skipped.

    Raises UserError for a file that is missing, no UTF-8 text, or empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a text file with one prompt a line") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts
