"""The child side of decoding: limits on memory, networks loaded once, requests answered until the parent hangs up."""

from __future__ import annotations

import functools
import os
import resource
import signal
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import av.logging
import numpy as np

from svd.config import CurationConfig
from svd.core.device import pick_device
from svd.curation.base.child_process import end_with_parent
from svd.curation.base.messages import (
    Analyse,
    ClipFound,
    CountParts,
    Done,
    Failed,
    OutOfMemory,
    Ready,
    VideoLength,
    WriteClips,
)
from svd.curation.base.types import ClipAnalysis, SourceAnalysis, SourceFailure
from svd.curation.clips.writer import write_clips
from svd.curation.cuts.transnet import transnet_probabilities
from svd.curation.measuring.axis_scores import axis_scores
from svd.curation.measuring.parts import analyse_part, count_parts, seconds_claimed
from svd.curation.motion.flow import flow_function
from svd.curation.text.base import text_areas
from svd.curation.text.registry import make_detector

_detector = functools.lru_cache(maxsize=1)(make_detector)  # loaded once per process


def limited_resource(device: str) -> tuple[int, int]:
    """Return the resource that bounds the memory of a process, and the column of /proc/self/statm with its size.

    On the CPU it is the address space. CUDA reserves far more addresses than it uses, so on a GPU it is the data
    segment: what the process may write to.
    """
    return (resource.RLIMIT_AS, 0) if device == "cpu" else (resource.RLIMIT_DATA, 5)


def limit_memory(extra: int, device: str) -> None:
    """Limit this process to `extra` bytes more than it has now; `device`: where its networks run."""
    kind, column = limited_resource(device)
    pages = int(Path("/proc/self/statm").read_text().split()[column]) if Path("/proc/self/statm").exists() else 0
    limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def load_networks(config: CurationConfig) -> str:
    """Load every network of the decode pass and run it once on a small image; return the device they are on.

    This comes before memory is limited: neither the size of the networks nor what their libraries (CUDA above all) load
    with the first image is the fault of a source. Raises UserError for missing weights.
    """
    raft, craft = config.motion.algorithm == "raft", config.text.detector == "craft"
    transnet = any(cut_pass.detector == "transnetv2" for cut_pass in config.cuts.passes)
    if raft or craft or transnet:
        import torch  # here, since a process without these networks must not pay for its memory

        torch.set_num_threads(1)  # one thread per source: sources are decoded side by side
    blank = np.zeros((128, 128, 3), np.uint8)  # the smallest image that RAFT takes
    if raft:
        flow_function(config.motion)[0](blank, blank)
    if transnet:
        transnet_probabilities(np.zeros((1, 27, 48, 3), np.uint8))
    _detector(config.text).polygons(blank)
    return pick_device() if raft or craft else "cpu"


def serve_requests(connection: Connection, memory: int, config: CurationConfig | None) -> None:
    """Run the child: send `Ready` or `Failed`, then answer requests until the parent hangs up.

    memory: bytes that requests may add to the process. config: whose networks to load; None: none.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    av.logging.set_level(None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl+C ends
    try:
        limit_memory(memory, load_networks(config) if config is not None else "cpu")
    except Exception as error:
        connection.send(Failed(" ".join(str(error).split()) or type(error).__name__))
        return
    connection.send(Ready())
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_answer(connection, request))


def _answer(connection: Connection, request: CountParts | Analyse | WriteClips) -> Done | Failed | OutOfMemory:
    """Do what a request asks for; progress is sent before the answer is returned."""
    try:
        match request:
            case CountParts(path, config):
                return Done(count_parts(path, config))
            case Analyse():
                return Done(_analyse(connection, request))
            case WriteClips(path, facts, jobs):
                connection.send(VideoLength(request.seconds))
                return Done(write_clips(path, facts, jobs))
    except SourceFailure as failure:
        return Failed(failure.reason)
    except MemoryError:
        return OutOfMemory()
    except Exception as error:  # the source is untrusted: whatever goes wrong with it is a reason of that source
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _analyse(connection: Connection, request: Analyse) -> SourceAnalysis:
    """Analyse one part of a source; its clips are sent as soon as they are complete, and their frames not kept."""
    detector = _detector(request.config.text)

    def send(clip: ClipAnalysis) -> ClipAnalysis:
        clip = replace(clip, text_areas=tuple(text_areas(list(clip.frames), detector)))
        connection.send(ClipFound(replace(clip, scores=axis_scores(clip))))
        return without_frames(clip)

    connection.send(VideoLength(seconds_claimed(request.path) / request.part[1]))
    return analyse_part(request.path, request.config, send, request.part, request.scratch, request.spans)


def without_frames(clip: ClipAnalysis) -> ClipAnalysis:
    """Return the clip without its frames, so that their memory is freed."""
    return replace(clip, frames=clip.frames[:0].copy())  # a copy: a view would keep the frames
