"""Tokens on disk: shards, their manifest, and streams that read them."""
