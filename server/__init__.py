"""The server of serve.py: OpenAI's API over the engine, and live runs. Imports base, model and engine."""
