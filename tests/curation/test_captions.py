"""Captioners: each real network at toy size, the merge through a real HTTP server, and which sidecar a clip gets."""

from __future__ import annotations

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from curation_inputs import write_video
from toy_models import randomised

from svd.config import CaptionsConfig
from svd.core.errors import UserError
from svd.curation.base.types import ClipSpan
from svd.curation.captions import coca, llm
from svd.curation.captions import registry as captioners
from svd.curation.captions import video as video_captioner
from svd.curation.captions.base import CaptionRequest, describe_all
from svd.curation.captions.beam_search import beam_search
from svd.curation.captions.known import known_captions
from svd.sources.source import SceneCaption, Source, Span

WORDS = ["a", "dog", "runs", "Question", "What", "happens", "in", "this", "video", "Answer", ":", "?", "Frame", "Time"]


@pytest.fixture(scope="module")
def request_of_clip(tmp_path_factory):
    video = tmp_path_factory.mktemp("captions") / "clip.mp4"
    write_video(video, frames=20)
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), np.uint8)
    return CaptionRequest("a", frames, video, {})


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "[PAD]", "[EOS]", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", bos_token="[EOS]"
    )


def known(start, end, zero=0.0, listed=None, **facts):
    """The sidecar captions of the clip [start, end), and its motion caption."""
    times = {"start_pts": 0, "end_pts": 0, "start_seconds": start, "end_seconds": end}
    span = ClipSpan(0, 9, **times, frames=9, method="copy", shot_start_frame=0, shot_end_frame=9, listed=listed)
    (_, motion), *sidecars = known_captions(Source("a", **facts), span, "pan-left", zero)
    return [text for name, text in sidecars if name == "sidecar"], motion


def test_the_sidecar_of_the_scene_that_overlaps_most():
    scenes = (SceneCaption("all of it"), SceneCaption("first", 0, 2), SceneCaption("second", 2, 5))
    assert known(1, 4, captions=scenes)[0] == ["all of it"]
    assert known(1, 4, captions=scenes[1:])[0] == ["second"]
    assert known(101, 102.5, zero=100, captions=scenes[1:])[0] == ["first"]
    assert known(6, 8, captions=scenes[1:])[0] == []
    assert "left" in known(1, 4)[1]
    assert known(1, 3, captions=(SceneCaption("first", 0, 2), SceneCaption("second", 2, 4)))[0] == ["first"]


def test_all_captions_of_a_video_or_of_a_span_are_kept():
    whole = (SceneCaption("one"), SceneCaption("two"))
    assert known(1, 4, captions=whole)[0] == ["one", "two"]
    spans = (Span(0, 9, ("mine", "also mine")), Span(9, 12))
    assert known(1, 4, listed=0, captions=whole, spans=spans)[0] == ["mine", "also mine"]
    assert known(9, 12, listed=1, captions=whole, spans=spans)[0] == ["one", "two"]


def test_later_captioners_see_the_earlier_ones(request_of_clip):
    class Echo:
        def __init__(self, name):
            self.name = name

        def describe(self, requests):
            return [f"{self.name} after {','.join(r.captions)}" if r.clip_id == "a" else "  " for r in requests]

    other = CaptionRequest("b", request_of_clip.frames, request_of_clip.video, {})
    found = describe_all([request_of_clip, other], [[("motion", "static")], []], [Echo("coca"), Echo("llm")])
    assert found == [[("motion", "static"), ("coca", "coca after motion"), ("llm", "llm after motion,coca")], []]


def test_coca_describes_the_middle_frame(request_of_clip):
    import open_clip
    from open_clip.coca_model import CoCa

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "attentional_pool": True}
    vision |= {"attn_pooler_heads": 2, "attn_pooler_queries": 8, "output_tokens": True}
    text = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "embed_cls": True}
    decoder = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    # open_clip leaves the projection of the decoder as the memory was.
    model = randomised(CoCa(32, decoder, text | {"output_tokens": True}, vision))
    captioner = coca.CocaCaptioner(model, open_clip.image_transform(32, is_train=False), "cpu")
    other = CaptionRequest("b", request_of_clip.frames[[1, 0, 2]], request_of_clip.video, {})
    # Only the middle frame counts, whatever stands beside it in the batch.
    first, second, third = captioner.describe([request_of_clip, other, request_of_clip])
    assert first == third == captioner.describe([request_of_clip])[0]
    assert isinstance(first, str) and "<start_of_text>" not in first
    assert captioner.describe([other]) == [second]


def test_beam_search_finds_the_best_of_all_sequences():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        table = torch.randn(4, 4, generator=generator) * 2  # next token given the last one; 0 starts, 3 ends
        table[:, 0] = -torch.inf
        found = beam_search(lambda tokens, t=table: t[tokens[:, -1]], 0, 3, beams=64, longest=5, shortest=2)
        best = max(_sequences(torch.log_softmax(table, -1)), key=lambda item: item[0])[1]
        assert found == best


def _sequences(log_probabilities, longest=5):
    """Every sequence with its mean log-probability a token."""
    for length in range(1, longest):
        for middle in itertools.product((1, 2), repeat=length):
            tokens = [0, *middle] if length == longest - 1 else [0, *middle, 3]
            total = sum(float(log_probabilities[a, b]) for a, b in itertools.pairwise(tokens))
            yield total / (len(tokens) - 1), list(middle)


def test_beam_search_is_greedy_with_one_beam_and_keeps_its_limits():
    table = torch.full((5, 5), -4.0)
    for last, token in ((0, 1), (1, 2), (2, 4), (4, 1)):
        table[last, token] = 4.0
    step = table.__getitem__
    assert beam_search(lambda tokens: step(tokens[:, -1]), 0, 4, beams=1, shortest=2) == [1, 2]
    assert len(beam_search(lambda tokens: step(tokens[:, -1]), 0, 4, beams=1, shortest=7)) >= 6
    assert len(beam_search(lambda tokens: step(tokens[:, -1]), 0, 3, beams=2, longest=6)) <= 5


def test_video_blip_with_one_frame_is_blip2(request_of_clip, tokenizer):
    from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessor, OPTConfig

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    language = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=128,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    config = Blip2Config(
        vision_config=small | {"image_size": 32, "patch_size": 16},
        qformer_config=small | {"encoder_hidden_size": 16, "vocab_size": 20},
        text_config=language.to_dict(),
        num_query_tokens=4,
    )
    model = Blip2ForConditionalGeneration(config).eval()

    class Processor:
        image_processor = BlipImageProcessor(size={"height": 32, "width": 32})

    Processor.tokenizer = tokenizer
    captioner = video_captioner.VideoBlipCaptioner(model, Processor(), "cpu", frames=4)
    pixels = torch.randn(2, 3, 3, 32, 32)
    with torch.inference_mode():
        vision = model.vision_model(pixel_values=pixels[:, 0]).last_hidden_state
        asked = model.query_tokens.expand(2, -1, -1)
        expected = model.language_projection(
            model.qformer(query_embeds=asked, encoder_hidden_states=vision).last_hidden_state
        )
        one = captioner.video_queries(pixels[:, :1])
        assert torch.allclose(one, expected, atol=1e-6)
        assert not torch.allclose(captioner.video_queries(pixels), one, atol=1e-6)
    (caption,) = captioner.describe([request_of_clip])
    assert caption is None or isinstance(caption, str)


def test_frames_for_video_captioners_are_spread_over_the_clip(request_of_clip):
    assert len(video_captioner.sample_frames(request_of_clip.video, 8).images) == 8
    assert len(video_captioner.sample_frames(request_of_clip.video, 50).images) == 20


def test_a_local_language_model_merges(request_of_clip, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=512))
    model.generation_config.pad_token_id = 1
    merger = llm.TransformersLlm(model, tokenizer, "cpu")
    both = CaptionRequest("a", request_of_clip.frames, request_of_clip.video, {"coca": "a dog", "video": "runs"})
    merged, nothing = merger.describe([both, request_of_clip])
    assert isinstance(merged, str) and nothing is None


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server that fails twice before it answers; `seen` are the requests."""
    seen: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status = 503 if len(seen) <= 2 else 404 if body["model"] == "unknown" else 200
            answer = {"choices": [{"message": {"content": " A dog runs through snow. "}}]}
            data = json.dumps(answer if status == 200 else {"error": "no"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    server.shutdown()


def test_an_endpoint_merges_and_is_tried_again(endpoint, request_of_clip):
    address, seen = endpoint
    merger = llm.EndpointLlm(address, "zephyr", wait=0.01, key="secret")
    captions = {"coca": "a dog in snow", "video": "a dog runs", "motion": "the camera is static"}
    both = CaptionRequest("a", request_of_clip.frames, request_of_clip.video, captions)
    assert merger.describe([both, request_of_clip]) == ["A dog runs through snow.", None]
    assert len(seen) == 3 and seen[-1]["path"] == "/v1/chat/completions" and seen[-1]["key"] == "Bearer secret"
    assert seen[-1]["messages"][-1]["content"] == "Frame: a dog in snow\nTime: a dog runs"
    with pytest.raises(UserError, match="no chat completion"):
        llm.EndpointLlm(address, "unknown", wait=0.01).describe([both])
    with pytest.raises(UserError, match="does not answer"):
        llm.EndpointLlm("http://127.0.0.1:9", "zephyr", attempts=2, wait=0.01).describe([both])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"captioners": ["video"]}, "needs video_model"),
        ({"captioners": ["llm"]}, "needs llm_model"),
        ({"captioners": ["coca"], "coca_weights": "no-such-tag"}, "can't be loaded"),
        ({"captioners": ["video"], "video_model": "/no/such/folder"}, "video_model: '/no/such/folder' can't be loaded"),
        ({"captioners": ["llm"], "llm_model": "/no/such/folder"}, "llm_model: '/no/such/folder' can't be loaded"),
    ],
)
def test_what_is_missing_is_named(values, message):
    with pytest.raises(UserError, match=message):
        captioners.make_captioners(CaptionsConfig.model_validate({"probabilities": {}, **values}), "cpu")
