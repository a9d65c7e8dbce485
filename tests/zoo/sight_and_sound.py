"""Models of pictures, of sound, and of both with text."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import VOCABULARY
from tests.zoo.entry import (
    MIXED,
    SIZES,
    Entry,
    Inputs,
    but,
    classes,
    frozen_statistics,
    generator_of,
    hugging_face,
    mean_over_tokens,
    normal,
    other_text,
    padded,
    pictures,
    words,
)

PATCHES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
           "image_size": 16, "patch_size": 8}  # fmt: skip


def _pictures(kind: str, **settings: Any) -> Entry:
    return Entry(hugging_face(kind, "ImageClassification", num_labels=3, **settings), pictures, classes, "vision")


_SWIN = _pictures(
    "swin", image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
)  # fmt: skip
_RESNET = hugging_face(
    "resnet", "ImageClassification", num_labels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1],
    layer_type="basic",
)  # fmt: skip
_WAV2VEC2: dict[str, Any] = {
    **SIZES, "conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "num_labels": 3,
    "classifier_proj_size": 8,
}  # fmt: skip


def sounds(n: int, seed: int) -> Inputs:
    generator = generator_of(seed)
    return {"input_values": normal(generator, n, 60), "labels": torch.randint(0, 3, (n,), generator=generator)}


def spectra(n: int, seed: int) -> Inputs:
    generator = generator_of(seed)
    return {"input_features": normal(generator, n, 4, 16), "labels": words(n, 7, generator)}


_CLIP_TEXT: dict[str, Any] = {**SIZES, "projection_dim": 8}


def pictures_and_texts(n: int, seed: int) -> Inputs:
    return {"pixel_values": pictures(n, seed)["pixel_values"], **padded(n, seed)}


def similarity(model: nn.Module, batch: Inputs) -> Tensor:
    """How far each picture is from its own text."""
    output = model(**batch)
    return torch.as_tensor(1 - (output.image_embeds * output.text_embeds).sum(dim=1))


def contrast(model: nn.Module, batch: Inputs) -> Tensor:
    """CLIP's loss: every picture against the texts of the whole batch."""
    logits = model(**batch).logits_per_image
    return F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")


IMAGE_TOKEN = VOCABULARY - 1


def pictures_in_texts(n: int, seed: int) -> Inputs:
    """Texts with four tokens' room for a picture."""
    ids = torch.randint(3, IMAGE_TOKEN, (n, 9), generator=generator_of(seed))
    ids[:, 1:5] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": pictures(n, seed)["pixel_values"]}


def text_after_picture(model: nn.Module, batch: Inputs) -> Tensor:
    logits = model(**batch, use_cache=False).logits
    return mean_over_tokens(logits[:, 4:-1], batch["input_ids"][:, 5:])


_CLIP = hugging_face("clip", "", text_config=_CLIP_TEXT, vision_config=PATCHES, projection_dim=8)
_SIGLIP = hugging_face("siglip", "", text_config=SIZES, vision_config=PATCHES)
_LLAVA = hugging_face(
    "llava", "ImageTextToText", image_token_id=IMAGE_TOKEN, vision_feature_layer=-1,
    text_config={"model_type": "llama", **SIZES, "num_key_value_heads": 1},
    vision_config={"model_type": "clip_vision_model", **PATCHES},
)  # fmt: skip

VISION = {
    "vit": _pictures("vit", **PATCHES),
    "dinov2": _pictures("dinov2", **PATCHES, mlp_ratio=2),
    "swin": _SWIN,
    "convnext": _pictures("convnext", patch_size=2, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "segformer": _pictures("segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
                           patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[2, 2], mlp_ratios=[2, 2],
                           decoder_hidden_size=8),
    "resnet, statistics frozen": Entry(frozen_statistics(_RESNET), pictures, classes, "vision"),
    "resnet": Entry(
        _RESNET, pictures, classes, "vision",
        mixed="batch normalisation in train mode",
    ),
}  # fmt: skip
SOUND = {
    "wav2vec2": Entry(hugging_face("wav2vec2", "AudioClassification", **_WAV2VEC2), sounds, classes, "audio"),
    "hubert, normed positions, statistics frozen": Entry(
        frozen_statistics(hugging_face("hubert", "AudioClassification", **_WAV2VEC2, conv_pos_batch_norm=True)),
        sounds, classes, "audio",
    ),
    "whisper": Entry(
        hugging_face("whisper", "SpeechSeq2Seq", **{
            **SIZES, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4,
            "max_source_positions": 8, "max_target_positions": 12, "decoder_start_token_id": 1,
        }),
        spectra, other_text, "audio",
    ),
}  # fmt: skip
TOGETHER = {
    "clip": Entry(_CLIP, pictures_and_texts, similarity, "multimodal"),
    "clip, contrastive loss": Entry(_CLIP, pictures_and_texts, contrast, "multimodal", refused="CLIPModel: " + MIXED),
    "clip, contrastive loss, temperature frozen": Entry(
        but(_CLIP, "logit_scale"), pictures_and_texts, contrast, "multimodal", mixed="the loss compares examples",
        told=False,
    ),
    "siglip, scale and bias frozen": Entry(
        but(_SIGLIP, "logit_scale", "logit_bias"), pictures_and_texts, similarity, "multimodal"
    ),
    "llava": Entry(_LLAVA, pictures_in_texts, text_after_picture, "multimodal"),
}  # fmt: skip

ENTRIES = {**VISION, **SOUND, **TOGETHER}
