"""llama.cpp with a GGUF file open: the wheel xllamacpp, of requirements/export.txt, asked over the loopback."""

import json
import urllib.request
from pathlib import Path

from base.cli import available_cores, import_extra


class LlamaCpp:
    def __init__(self, path: Path, context: int, threads: int | None = None, exact: bool = False, parallel: int = 1):
        """Opens a file, for `parallel` texts of `context` tokens at a time.

        exact: with a cache in float32, in place of its usual float16.
        """
        xllamacpp = import_extra("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.verbosity = context * parallel, parallel, 0
        params.cpuparams.n_threads = threads or available_cores()
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, endpoint: str, **body) -> dict:
        """What one of the server's endpoints answers to an object of JSON."""
        request = urllib.request.Request(f"{self.server.listening_address}/{endpoint}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self.ask("tokenize", content=text, add_special=False, parse_special=parse_special)["tokens"]

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """By the template in the file, and up to the assistant's answer."""
        chat = {"messages": messages} | ({"tools": tools} if tools else {})
        return self.encode(self.ask("apply-template", **chat)["prompt"], parse_special=True)

    def generate(self, prompt: list[int], n: int, **options) -> dict:
        """The answer of its completion endpoint: up to n tokens, each the most probable."""
        return self.ask("completion", prompt=prompt, n_predict=n, temperature=0, return_tokens=True, **options)
