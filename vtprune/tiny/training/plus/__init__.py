"""Trains what the tiny Qwen2-VL Plus adds to the tiny Qwen2-VL: a low-rank change, for words, gaps, pairs, films."""
