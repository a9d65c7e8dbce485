"""Encoders that fill in masked tokens, and encoders with decoders."""

from dataclasses import replace
from typing import Any

from tests.zoo.entry import SIZES, Entry, hugging_face, masked, other_text, other_text_with_cache, pairs, same_tokens


def _encoder(kind: str, **settings: Any) -> Entry:
    return Entry(hugging_face(kind, "MaskedLM", **{**SIZES, **settings}), masked, same_tokens, "encoder")


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
_T5 = _both("t5", **T5)

ENTRIES = {
    "bert": _encoder("bert"),
    "roberta": _encoder("roberta"),
    "distilbert": _encoder("distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "albert": _encoder("albert", embedding_size=8),
    "electra": _encoder("electra", embedding_size=8),
    "deberta-v2": _encoder("deberta-v2", share_att_key=True, **_DEBERTA),
    "deberta-v2, positions apart": _encoder("deberta-v2", **_DEBERTA),
    "mpnet": _encoder("mpnet"),
    "modernbert": _encoder("modernbert", local_attention=4, global_attn_every_n_layers=2),
    "t5": _T5,
    "t5, gated": _both("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5),
    "t5, with its cache": replace(_T5, losses=other_text_with_cache),
    "bart": _both("bart", **BART),
    "marian": _both("marian", **BART),
    "pegasus": _both("pegasus", **BART),
}  # fmt: skip
