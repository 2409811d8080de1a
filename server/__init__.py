"""server: what serve.py starts, OpenAI's API and live runs. It may import base, model, engine and training."""
