"""How a model learns: packing, losses, the loop, saving, the log. Imports base, model, engine and corpus."""
