"""What serve.py starts: OpenAI's API over the engine, live runs. Imports base, model and engine."""
