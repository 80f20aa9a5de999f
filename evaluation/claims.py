"""Claims about what a model does: a value beside its control, and by how many standard errors it is better.

An evaluation writes its claims to `claims.json`; the report shows one line for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation.tables import markdown
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.core.margins import is_shown, margin
from svd.storage import write_bytes


@dataclass(frozen=True)
class Claim:
    """One claim.

    text: what is claimed. value, control_value: the two figures; `control` says what the second one is of. unit: of
    both. margin: how much better the value is, in standard errors; None where that isn't known. n: clips, objects or
    samples. low, high: the 95 % interval of a share. protocol: the digest of how it was measured.
    """

    text: str
    value: float
    control: str
    control_value: float
    margin: float | None
    n: int
    unit: str = ""
    low: float | None = None
    high: float | None = None
    protocol: str = ""

    @property
    def shown(self) -> bool:
        """Whether the value beats its control by enough standard errors, on enough samples."""
        return is_shown(self.margin, self.n)

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return "shown" if self.shown else "not shown"


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share; (0, 1) for n = 0.

    >>> wilson(0, 10)
    (0.0, 0.2775...)
    """
    if n == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (low if successes else 0.0), (high if successes < n else 1.0)  # exact at the ends, whatever is rounded


def share_claim(text: str, right: Sequence[bool], control: str, expected: float, protocol: str = "") -> Claim:
    """Claim that a share is above an `expected` one (chance), by the score test."""
    n, share = len(right), sum(right) / max(1, len(right))
    error = math.sqrt(expected * (1 - expected) / max(1, n))
    low, high = wilson(sum(right), n)
    found = (share - expected) / error if error > 0 and n else None
    return Claim(text, share, control, expected, found, n, "share", low, high, protocol)


def paired_shares_claim(
    text: str, right: Sequence[bool], control: str, right_control: Sequence[bool], protocol: str = ""
) -> Claim:
    """Claim that one subject is right more often than another on the same questions, by McNemar's test."""
    won = sum(a and not b for a, b in zip(right, right_control, strict=True))
    lost = sum(b and not a for a, b in zip(right, right_control, strict=True))
    n = max(1, len(right))
    low, high = wilson(sum(right), len(right))
    found = (won - lost) / math.sqrt(won + lost) if won + lost else 0.0
    return Claim(text, sum(right) / n, control, sum(right_control) / n, found, len(right), "share", low, high, protocol)


def paired_claim(
    text: str,
    values: Sequence[float],
    control: str,
    controls: Sequence[float],
    unit: str = "",
    less: bool = False,
    protocol: str = "",
) -> Claim:
    """Claim that the mean of `values` is above (`less`: below) that of `controls`, paired over clips."""
    sign = -1 if less else 1
    differences = [sign * (a - b) for a, b in zip(values, controls, strict=True)]
    n = max(1, len(values))
    return Claim(
        text, sum(values) / n, control, sum(controls) / n, margin(differences), len(values), unit, None, None, protocol
    )


def write_claims(folder: Path, claims: Sequence[Claim]) -> None:
    """Write `claims.json` for programs and `claims.md` for people into a stage's finished folder."""
    write_json(folder / "claims.json", [asdict(claim) for claim in claims])
    rows = [asdict(claim) | {"verdict": claim.verdict} for claim in claims]
    write_bytes(folder / "claims.md", markdown(rows).encode())


def read_claims(folder: Path) -> list[Claim]:
    """Read a stage's `claims.json`; none when it has no such file. Raises UserError for a damaged one."""
    path = folder / "claims.json"
    if not path.is_file():
        return []
    try:
        return [Claim(**entry) for entry in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); run its stage again") from None
