"""Teach Qwen-Image a new subject: LoRA on the transformer, optionally with a fresh zero-prior placeholder token."""
