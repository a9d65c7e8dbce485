"""Encoders that fill in masked tokens, and encoders with decoders."""

from dataclasses import replace
from typing import Any

from tests.zoo.entry import BATCHLESS, SIZES, Entry, but, hugging_face, masked, other_text, pairs, same_tokens


def _encoder(kind: str, **settings: Any) -> Entry:
    return Entry(hugging_face(kind, "MaskedLM", **{**SIZES, **settings}), masked, same_tokens, "encoder")


def _frozen(entry: Entry, *parts: str) -> Entry:
    return replace(entry, build=but(entry.build, *parts), refused="")


def _both(kind: str, **settings: Any) -> Entry:
    build = hugging_face(kind, "Seq2SeqLM", **{**SIZES, "decoder_start_token_id": 1, **settings})
    return Entry(build, pairs, other_text, "encoder-decoder")


BART: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}

_DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4,
            "norm_rel_ebd": "layer_norm"}  # fmt: skip
_APART = _encoder("deberta-v2", **_DEBERTA)
_MPNET = replace(_encoder("mpnet"), refused="relative_attention_bias" + BATCHLESS)
_T5 = replace(_both("t5", **T5), refused="relative_attention_bias" + BATCHLESS)

ENTRIES = {
    "bert": _encoder("bert"),
    "roberta": _encoder("roberta"),
    "distilbert": _encoder("distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "albert": _encoder("albert", embedding_size=8),
    "electra": _encoder("electra", embedding_size=8),
    "deberta-v2": replace(_encoder("deberta-v2", share_att_key=True, **_DEBERTA), refused="key_proj.*" + BATCHLESS),
    "deberta-v2, positions frozen": _frozen(
        _APART, "rel_embeddings", "encoder.LayerNorm", "pos_key_proj", "pos_query_proj"
    ),
    "mpnet": _MPNET,
    "mpnet, position bias frozen": _frozen(_MPNET, "relative_attention_bias"),
    "modernbert": _encoder("modernbert", local_attention=4, global_attn_every_n_layers=2),
    "t5": _T5,
    "t5, position bias frozen": _frozen(_T5, "relative_attention_bias"),
    "t5, gated": replace(
        _both("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5), refused=_T5.refused
    ),
    "bart": _both("bart", **BART),
    "marian": _both("marian", **BART),
    "pegasus": _both("pegasus", **BART),
}  # fmt: skip
