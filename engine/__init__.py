"""Inference: KV cache, continuous batching, sampling, streaming, exams, packed weights. Imports base and model."""
