"""Raw files -> documents of tokens in a prepared folder, of which it owns the format. Imports base and model.chat."""
