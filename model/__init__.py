"""The network, and what it is on disk: sizes, decoder, adapters, chats, Hugging Face, GGUF. Imports base."""
