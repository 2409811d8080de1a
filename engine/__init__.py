"""How a model writes and chooses: the cache, sampling, streaming, exams, layout for CPUs. Imports base and model."""
