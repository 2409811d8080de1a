"""How a model writes: the cache, sampling, streaming, the layout for CPUs. Imports base and model."""
