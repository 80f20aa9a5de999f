"""Beam search over any next-token function.

open_clip's own beam search for CoCa needs functions that transformers 5 removed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]


@torch.inference_mode()
def beam_search(step: Step, start: int, end: int, *, beams: int = 6, longest: int = 30, shortest: int = 5) -> list[int]:
    """Return the tokens between `start` and `end` of the sequence with the highest mean log-probability per token.

    step: maps K token sequences (K, L) int64 to the logits of the next token (K, V).
    longest: tokens of a sequence, `start` included. shortest: tokens before which `end` is not allowed.
    Ties go to the smaller token, so the result is deterministic.
    """
    sequences, totals = torch.tensor([[start]]), torch.zeros(1)
    finished: list[tuple[float, list[int]]] = []
    while sequences.shape[1] < longest and len(sequences):
        scores = torch.log_softmax(step(sequences).float().cpu(), -1)
        if sequences.shape[1] < shortest:
            scores[:, end] = -torch.inf
        flat = (totals[:, None] + scores).flatten()
        values, places = flat.sort(descending=True, stable=True)
        values, places = values[: 2 * beams], places[: 2 * beams]
        possible = values > -torch.inf
        values, places = values[possible], places[possible]
        parents, tokens = places // scores.shape[1], places % scores.shape[1]
        ends = tokens == end
        for value, parent in zip(values[ends].tolist(), parents[ends].tolist(), strict=True):
            finished.append((value / sequences.shape[1], sequences[parent, 1:].tolist()))
        alive = torch.nonzero(~ends).flatten()[:beams]
        sequences = torch.cat([sequences[parents[alive]], tokens[alive, None]], 1)
        totals = values[alive]
        # More tokens only lower a sum: once no living beam can pass the best finished one, the search is over.
        if len(finished) >= beams and len(totals) and max(finished)[0] >= float(totals.max()) / (longest - 1):
            break
    finished += [
        (t / (sequences.shape[1] - 1), s[1:]) for t, s in zip(totals.tolist(), sequences.tolist(), strict=True)
    ]
    return max(finished, key=lambda item: item[0])[1]
