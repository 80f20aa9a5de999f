"""The camera motions that LoRAs are trained for (§4.3.1, D.4.2), by the labels of curation's camera classifier."""

from __future__ import annotations

from collections.abc import Mapping

# "object-motion" is a camera that stands still while things move.
CAMERAS: Mapping[str, tuple[str, ...]] = {
    "horizontal": ("pan-left", "pan-right"),
    "zoom": ("zoom-in", "zoom-out"),
    "static": ("static", "object-motion"),
}
