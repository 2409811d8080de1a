"""llama.cpp with a GGUF file open: the wheel xllamacpp, of requirements/export.txt, over its local server."""

import json
import urllib.request
from pathlib import Path

from base.cli import available_cores, import_extra


class LlamaCpp:
    def __init__(self, path: Path, context: int, threads: int | None = None, exact: bool = False, parallel: int = 1):
        """Opens a file, for `parallel` sequences of `context` tokens at a time.

        exact: with a KV cache in float32 instead of float16.
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

    def post(self, endpoint: str, **body) -> dict:
        """Posts JSON to one of the server's endpoints and returns its JSON response."""
        request = urllib.request.Request(f"{self.server.listening_address}/{endpoint}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self.post("tokenize", content=text, add_special=False, parse_special=parse_special)["tokens"]

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """With the template in the file, including the assistant's header."""
        chat = {"messages": messages} | ({"tools": tools} if tools else {})
        return self.encode(self.post("apply-template", **chat)["prompt"], parse_special=True)

    def generate(self, prompt: list[int], n: int, **options) -> dict:
        """The response of its completion endpoint: up to n tokens, decoded greedily."""
        return self.post("completion", prompt=prompt, n_predict=n, temperature=0, return_tokens=True, **options)
