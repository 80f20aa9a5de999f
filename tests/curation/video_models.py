"""Video-text models of transformers with random weights, a few kilobytes each, saved as their makers publish them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [
    "a",
    "dog",
    "runs",
    "user",
    "assistant",
    "Question",
    "What",
    "happens",
    "in",
    "this",
    "video",
    "Answer",
    "Describe",
    "one",
    "sentence",
    "what",
    ".",
    ":",
    "?",
]
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'video' %}VIDEO "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}"
)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}


def word_tokenizer(special: Sequence[str] = ()) -> hf.PreTrainedTokenizerFast:
    """A tokenizer that knows WORDS."""
    names = ["[UNK]", "[PAD]", "[EOS]", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", bos_token="[EOS]"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def save(folder: Path, model: type[hf.PreTrainedModel], config: hf.PreTrainedConfig, processor: object) -> Path:
    """Write a model with random weights and its processor."""
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llama(tokenizer: hf.PreTrainedTokenizerFast) -> dict:
    """The configuration of a tiny language model."""
    return hf.LlamaConfig(vocab_size=len(tokenizer), **SMALL, **SPECIAL).to_dict()


def clip_vision(image_size: int = 32) -> dict:
    """The configuration of a tiny image encoder of 16 patches."""
    return hf.CLIPVisionConfig(**SMALL | {"num_hidden_layers": 2}, image_size=image_size, patch_size=8).to_dict()


def save_llava_next_video(folder: Path) -> Path:
    """LLaVA-NeXT-Video: every frame is pooled to 4 tokens."""
    tokenizer = word_tokenizer(["<image>", "<video>"])
    image, video = (tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<video>"))
    config = hf.LlavaNextVideoConfig(
        vision_config=clip_vision(),
        text_config=llama(tokenizer),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[32, 32]],
    )
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = hf.LlavaNextVideoProcessor(
        video_processor=hf.LlavaNextVideoVideoProcessor(**sizes),
        image_processor=hf.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=[[32, 32]]),
        tokenizer=tokenizer,
        chat_template=CHAT.replace("VIDEO", "<video>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return save(folder, hf.LlavaNextVideoForConditionalGeneration, config, processor)


def save_llava(folder: Path) -> Path:
    """LLaVA, which takes pictures only."""
    tokenizer = word_tokenizer(["<image>"])
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = hf.LlavaConfig(vision_config=clip_vision(), text_config=llama(tokenizer), image_token_index=image)
    processor = hf.LlavaProcessor(hf.CLIPImageProcessor(), tokenizer, patch_size=8, chat_template=CHAT)
    return save(folder, hf.LlavaForConditionalGeneration, config, processor)


def _qwen_text(tokenizer: hf.PreTrainedTokenizerFast, section: list[int]) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    return {**SMALL, **SPECIAL, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "rope_parameters": rope}


def _qwen_ids(tokenizer: hf.PreTrainedTokenizerFast) -> dict:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(QWEN_TOKENS), strict=True))


def save_qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL: two frames and 4 × 4 pixels make a patch, 2 × 2 patches a token."""
    tokenizer = word_tokenizer(QWEN_TOKENS)
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(
        text_config=_qwen_text(tokenizer, [1, 1, 2]), vision_config=vision, **_qwen_ids(tokenizer)
    )
    sizes = PATCHES | {"min_pixels": 64, "max_pixels": 1024}
    processor = hf.Qwen2VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**sizes),
        video_processor=hf.Qwen2VLVideoProcessor(**sizes),
        tokenizer=tokenizer,
        chat_template=CHAT.replace("VIDEO", QWEN_VIDEO),
    )
    return save(folder, hf.Qwen2VLForConditionalGeneration, config, processor)


def save_qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL: as Qwen2-VL, and it is told the times of the frames; it would choose among them if it were let."""
    tokenizer = word_tokenizer(QWEN_TOKENS)
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = _qwen_text(tokenizer, [2, 1, 1]) | {"head_dim": 8}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    size = {"shortest_edge": 128, "longest_edge": 8192}
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**PATCHES),
        video_processor=hf.Qwen3VLVideoProcessor(**PATCHES, size=size),
        tokenizer=tokenizer,
        chat_template=CHAT.replace("VIDEO", QWEN_VIDEO),
    )
    return save(folder, hf.Qwen3VLForConditionalGeneration, config, processor)


def save_video_blip(folder: Path, language: str) -> Path:
    """VideoBLIP, in its published form BLIP-2's own, with OPT or T5 as its language model."""
    tokenizer = word_tokenizer()
    opt = {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 128}
    t5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1}
    text = {
        "opt": lambda: hf.OPTConfig(vocab_size=len(tokenizer), **SMALL | opt, **SPECIAL),
        "t5": lambda: hf.T5Config(vocab_size=len(tokenizer), **t5, **SPECIAL),
    }[language]()
    config = hf.Blip2Config(
        vision_config={**SMALL, "image_size": 32, "patch_size": 16, "initializer_range": 0.1},
        qformer_config={**SMALL, "num_hidden_layers": 2, "encoder_hidden_size": 16, "vocab_size": 20},
        text_config=text.to_dict(),
        num_query_tokens=4,
    )
    pictures = hf.BlipImageProcessor(size={"height": 32, "width": 32})
    processor = hf.Blip2Processor(image_processor=pictures, tokenizer=tokenizer, num_query_tokens=4)
    return save(folder, hf.Blip2ForConditionalGeneration, config, processor)
