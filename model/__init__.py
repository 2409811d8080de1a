"""The network and its files: configuration, decoder, LoRA, chat template, checkpoints, GGUF. Imports base."""
