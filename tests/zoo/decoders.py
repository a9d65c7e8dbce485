"""Language models that predict the next token: decoders, mixtures of experts, state spaces."""

from dataclasses import replace
from typing import Any

from tests.zoo.entry import SIZES, Entry, hugging_face, next_tokens, padded, texts

GROUPED: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8}


def _decoder(kind: str, *, with_padding: bool = False, refused: str = "", **settings: Any) -> Entry:
    """Seven texts of seven tokens, or five padded ones."""
    build = hugging_face(kind, "CausalLM", **{**SIZES, **settings})
    if with_padding:
        return Entry(build, padded, next_tokens, "decoder", refused=refused)
    return Entry(build, lambda n, seed: texts(n, seed, 7), next_tokens, "decoder", examples=7, refused=refused)


_EXPERTS: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}

DECODERS = {
    "gpt2": _decoder("gpt2"),
    "gpt2, padded": _decoder("gpt2", with_padding=True),
    "gpt_neo": _decoder("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], window_size=4),
    "gptj": _decoder("gptj", rotary_dim=4, tie_word_embeddings=False),
    "codegen": _decoder("codegen", rotary_dim=4, tie_word_embeddings=False, n_head=4, num_attention_heads=4),
    "gpt_neox": _decoder("gpt_neox"),
    "gpt_bigcode": _decoder("gpt_bigcode"),
    "opt": _decoder("opt", ffn_dim=24, word_embed_proj_dim=16),
    "opt, padded": _decoder("opt", with_padding=True, ffn_dim=24, word_embed_proj_dim=16),
    "bloom": _decoder("bloom", with_padding=True),
    "mpt": _decoder("mpt", max_seq_len=24, expansion_ratio=2),
    "falcon": _decoder("falcon"),
    "llama": _decoder("llama", **GROUPED),
    "llama, tied": _decoder("llama", with_padding=True, tie_word_embeddings=True, **GROUPED),
    "mistral": _decoder("mistral", sliding_window=4, **GROUPED),
    "qwen2": _decoder("qwen2", with_padding=True, **GROUPED),
    "qwen3": _decoder("qwen3", **GROUPED),
    "gemma2": _decoder("gemma2", sliding_window=4, **GROUPED),
    "gemma3": _decoder("gemma3_text", sliding_window=4, **GROUPED),
    "phi": _decoder("phi"),
    "phi3": _decoder("phi3", with_padding=True),
    "olmo2": _decoder("olmo2"),
    "stablelm": _decoder("stablelm", num_key_value_heads=1),
    "starcoder2": _decoder("starcoder2", num_key_value_heads=1),
    "cohere": _decoder("cohere", num_key_value_heads=1),
    "smollm3": _decoder("smollm3", num_key_value_heads=1),
}

EXPERTS = {
    "mixtral": replace(
        _decoder("mixtral", num_local_experts=4, **_EXPERTS), single=True
    ),
    "mixtral, experts one by one": _decoder(
        "mixtral", with_padding=True, num_local_experts=4, experts_implementation="eager", **_EXPERTS
    ),
    "qwen2_moe": _decoder("qwen2_moe", num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=12,
                          experts_implementation="eager", **_EXPERTS),
    "qwen3_moe": _decoder("qwen3_moe", num_experts=4, moe_intermediate_size=12, experts_implementation="eager",
                          **_EXPERTS),
    "olmoe": _decoder("olmoe", num_experts=4, experts_implementation="eager", **_EXPERTS),
}  # fmt: skip

STATE_SPACES = {
    "mamba": _decoder("mamba", state_size=4, conv_kernel=3, expand=2),
    "mamba2": replace(
        _decoder("mamba2", state_size=4, conv_kernel=3, expand=2, num_heads=4, head_dim=8, n_groups=2, chunk_size=4),
        partly=True,
    ),
    "rwkv": _decoder("rwkv", attention_hidden_size=16, context_length=16),
    "recurrent_gemma": replace(_decoder(
        "recurrent_gemma", lru_width=16, attention_window_size=4,
        num_key_value_heads=1, block_types=("recurrent", "attention"), conv1d_width=3,
    ), partly=True),
}  # fmt: skip

ENTRIES = {
    **DECODERS,
    **{name: replace(entry, family="mixture of experts") for name, entry in EXPERTS.items()},
    **{name: replace(entry, family="state space") for name, entry in STATE_SPACES.items()},
}
