"""Small shapes that together use every option of both families."""

from __future__ import annotations

from shoal.config.options import Model

LLAMA = Model(vocab_size=97, dim=64, num_layers=2, num_heads=4, max_seq_len=128)
GPT2 = Model(family="gpt2", vocab_size=97, dim=64, num_layers=2, num_heads=4, max_seq_len=64, tie_embeddings=True)

SHAPES: dict[str, Model] = {
    "llama": LLAMA,
    "llama3": Model(
        vocab_size=97, dim=64, num_layers=2, num_heads=8, num_kv_heads=2, ffn_dim=96, max_seq_len=512,
        rope_theta=500.0, rope_factor=8.0, rope_original_seq_len=64,
    ),
    "smollm2": Model(
        vocab_size=97, dim=72, num_layers=3, num_heads=9, num_kv_heads=3, ffn_dim=96, max_seq_len=128,
        rope_theta=1e5, tie_embeddings=True,
    ),
    "qwen2": Model(
        vocab_size=97, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=128, norm_eps=1e-6,
        qkv_bias=True, tie_embeddings=True, rope_theta=1e6,
    ),
    "qwen3": Model(
        vocab_size=97, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, max_seq_len=128,
        norm_eps=1e-6, qk_norm=True, rope_theta=1e6,
    ),
    "gpt2": GPT2,
    "gpt2-untied": Model(family="gpt2", vocab_size=97, dim=48, num_layers=2, num_heads=3, max_seq_len=64, ffn_dim=80),
}  # fmt: skip
