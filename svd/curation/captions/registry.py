"""The captioners of the paper (§3.1): CoCa on the middle frame, a video captioner on the clip, an LLM that merges both.

All run behind `svd.curation.captions.base.Captioner`. Weights come by hub id or path; transformers is the extra
`captions`.
"""

from __future__ import annotations

from svd.config import CaptionsConfig
from svd.core.errors import UserError
from svd.curation.captions.base import VIDEO, Captioner
from svd.curation.captions.coca import COCA, CocaCaptioner
from svd.curation.captions.llm import LLM, _make_llm


def make_captioners(config: CaptionsConfig, device: str) -> list[Captioner]:
    """The configured captioners that need a network, in the order they must run (the LLM last).

    Raises UserError that names the option which is missing. `sidecar` and `motion` are known from measuring already.
    """
    wanted = set(config.captioners)
    captioners: list[Captioner] = []
    if COCA in wanted:
        captioners.append(CocaCaptioner.load(config.coca_model, config.coca_weights, device))
    if VIDEO in wanted:
        from svd.curation.captions.video import load_video_captioner

        if config.video_model is None:
            raise UserError(
                "curation.captions: captioner 'video' needs video_model, such as kpyu/video-blip-opt-2.7b-ego4d"
            )
        captioners.append(load_video_captioner(config.video_model, device))
    if LLM in wanted:
        captioners.append(_make_llm(config, device))
    return captioners
