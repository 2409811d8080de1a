"""Verification of exports: llama.cpp or transformers load them; tokens, chats and probabilities are compared.

A failed comparison is an OSError: then write_file and replacing_directory do not keep the file.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from base.cli import one_line
from model.chat import ChatTokenizer, encode, load_tokenizer
from model.checkpoint import stop_ids
from model.gguf import rounded
from model.llama_cpp import LlamaCpp
from model.model import CausalLM

# Allowed mean difference of a token's log-probability, in nats: several times what was measured. llama.cpp rounds more
# than the file's weights: it also converts activations to the type of the matrix.
TOLERANCES = {"f32": 1e-3, "f16": 0.05, "bf16": 0.2, "q8_0": 0.5, "q4_0": 0.5}
PLAIN_TEXTS = [  # where tokenizers differ
    "春天来了，山上的花开了。水在一百度时沸腾！",
    "The cat sat on the mat;  she didn't   look up.",
    " leading and trailing ",
    "第 1 章\n\n  1,234.50 元\t= ¥1234.5",
    "def f(x):\n    return x ** 2  # квадрат",
    "龘靐 🙂👩‍👩‍👧 e\u0301 \u00a0 ﷽",
]
CONTEXT = 2048  # tokens: longer than the texts and chats below
CONTROL_TEXT = "<|im_start|>user <|end_of_text|> <unk> <0x41>"  # must be encoded as plain text
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "天气", "description": "一城之天气", "parameters": PARAMETERS}}
CALL = {"type": "function", "function": {"name": "天气", "arguments": {"city": "北京"}}}
CHAT = [
    {"role": "system", "content": "You are 芥子."},
    {"role": "user", "content": "北京天气如何？"},
    {"role": "assistant", "content": "", "reasoning_content": "先查一查。", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"temperature": 21}'},
    {"role": "assistant", "content": "21 degrees."},
    {"role": "user", "content": "谢谢！ And tomorrow?"},
]


def verify_gguf(path: Path, model: CausalLM, tokenizer_dir: Path, weight_type: str) -> str:
    """Opens the file in llama.cpp. Returns a sentence on what was compared, with figures."""
    tokenizer = load_tokenizer(tokenizer_dir)
    llama_cpp = LlamaCpp(path, min(model.config.max_position_embeddings, CONTEXT), threads=1, exact=True)
    normalizer = None if tokenizer.is_own else tokenizer.backend.normalizer
    texts = [*PLAIN_TEXTS, CONTROL_TEXT]
    for text in texts:
        plain = normalizer.normalize_str(text) if normalizer else text  # llama.cpp leaves out Qwen's NFC
        _check(llama_cpp.encode(plain) == encode(tokenizer, text), f"tokens of {text!r}")
    if model.is_chat:
        chat, tools = _chat(tokenizer)
        ids = tokenizer.prompt(chat, tools)
        with _using("the chat template"):
            their_ids = llama_cpp.encode_chat(chat, tools)
        _check(their_ids == ids, "tokens of a chat with tools")
    prompts = _prompts(model, tokenizer)
    stop = tokenizer.end_of_turn if model.is_chat else tokenizer.eos
    stopped = llama_cpp.generate(prompts[0], 2, logit_bias=[[stop, 1000.0]])["stop_type"] == "eos"
    _check(stopped, f"stops at token {stop}")
    in_file, compared = rounded(model, weight_type), []
    for prompt in prompts:
        ids, places, theirs = _generate_with_llama_cpp(llama_cpp, prompt, 8, model.config.vocab_size, tokenizer)
        with torch.no_grad():
            ours, meant = (network(ids)[0, places] for network in (model, in_file))
        compared.append((*_compare(ours, theirs), _compare(meant, theirs)[1]))
    return f"llama.cpp: {_figures(compared, weight_type)}; the stop token, {_same_tokens(model, len(texts))}"


def verify_folder(directory: Path, model: CausalLM, tokenizer_dir: Path, weight_type: str) -> str:
    """Opens the folder in transformers. Returns a sentence on what was compared, with figures."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ours = load_tokenizer(tokenizer_dir)
    with _using("the tokenizer"):
        theirs = AutoTokenizer.from_pretrained(directory)
    for text in PLAIN_TEXTS:
        _check(theirs(text, add_special_tokens=False).input_ids == encode(ours, text), f"tokens of {text!r}")
    if ours.is_own or model.is_chat:
        chat, tools = _chat(ours)
        ids = ours.prompt(chat, tools)
        with _using("the chat template"):
            their_ids = theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=True, return_dict=False)
        _check(their_ids == ids, "tokens of a chat with tools")
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    _check(stop_ids(network.generation_config.to_dict()) == model.stop_token_ids, "stop tokens")
    compared = []
    for prompt in _prompts(model, ours):
        prompt = torch.tensor([prompt])
        with torch.no_grad():
            same, difference = _compare(model(prompt)[0], network(prompt).logits[0].log_softmax(-1))
        compared.append((same, difference, difference))
    return f"transformers: {_figures(compared, weight_type)}; the stop tokens, {_same_tokens(model, len(PLAIN_TEXTS))}"


@contextlib.contextmanager
def _using(what: str) -> Iterator[None]:
    """OSError for any error: the model's files may come from a stranger and raise anything."""
    try:
        yield
    except Exception as error:
        raise OSError(f"verification failed: {what} cannot be used: {one_line(error)}") from None


def _check(same: bool, what: str):
    if not same:
        raise OSError(f"verification failed: {what} differ from the original")


def _chat(tokenizer: ChatTokenizer) -> tuple[list[dict], list | None]:
    """CHAT, or a part of it where the format has no tokens for calls of tools."""
    if "tool_call" in tokenizer.tags and (tokenizer.is_own or tokenizer.template.shows_tools):
        return CHAT, [TOOL]
    return [CHAT[1], CHAT[4], CHAT[5]], None


def _prompts(model: CausalLM, tokenizer: ChatTokenizer) -> list[list[int]]:
    if not model.is_chat:
        return [[*tokenizer.bos, *encode(tokenizer, text)] for text in PLAIN_TEXTS]
    chats = (CHAT[1:2], None), ([{"role": "user", "content": "Who are you?"}], None), _chat(tokenizer)
    return [tokenizer.prompt(messages, tools) for messages, tools in chats]


def _generate_with_llama_cpp(
    llama_cpp: LlamaCpp, prompt: list[int], n: int, vocab_size: int, tokenizer: ChatTokenizer
) -> tuple[Tensor, list[int], Tensor]:
    """Lets llama.cpp generate up to n tokens. Returns their inputs (1, T), places in them, and the log-probabilities of
    what follows there (places, V). It tells none of a token that ends within a character."""
    response = llama_cpp.generate(prompt, n, n_probs=vocab_size)
    tokens, steps = response["tokens"], response["completion_probabilities"]
    log_probs = torch.full((len(steps), vocab_size), -torch.inf)
    for row, step in zip(log_probs, steps):
        for choice in step["top_logprobs"]:
            row[choice["id"]] = choice["logprob"]
    text, places = b"", []
    for place, token in enumerate(tokens, start=len(prompt) - 1):
        text += tokenizer.pieces[token] if token < len(tokenizer.pieces) else b""
        if not _is_cut(text):
            places.append(place)
    places = places[: len(steps)]
    ids = prompt + tokens
    _check([ids[place + 1] for place in places] == [step["id"] for step in steps], "the positions of generated tokens")
    return torch.tensor([ids[:-1]]), places, log_probs


def _is_cut(text: bytes) -> bool:
    """Whether llama.cpp waits for the rest of a character: one of the last bytes begins a longer one."""
    lengths = ((0xE0, 0xC0, 2), (0xF0, 0xE0, 3), (0xF8, 0xF0, 4))  # mask, first byte, bytes of the character
    last = enumerate(reversed(text[-4:]), start=1)
    return any(byte & mask == first and n < length for n, byte in last for mask, first, length in lengths)


def _compare(logits: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Compares logits with log-probabilities (n, V): whether the most probable tokens agree (n,), and the differences
    above e^-20 (any,), below which llama.cpp has only zeros."""
    ours = logits.float().log_softmax(-1)
    likely = ours > -20
    return ours.argmax(-1) == theirs.argmax(-1), (ours - theirs)[likely].abs()


def _figures(compared: list[tuple[Tensor, Tensor, Tensor]], weight_type: str) -> str:
    """Summarises _compare's results with the original. The differences from the rounded model decide: OSError."""
    same, difference, unexplained = (torch.cat(parts) for parts in zip(*compared))
    mean, limit = unexplained.mean().item(), TOLERANCES[weight_type]
    if not mean <= limit:  # also for NaN
        raise OSError(
            f"verification failed: log-probabilities differ by {mean:.2g} on average; {weight_type} allows {limit}"
        )
    return (
        f"the same most probable token at {same.sum()} of {len(same)} positions; log-probabilities differ by "
        f"{difference.mean():.1g} on average, {difference.max():.1g} at most"
    )


def _same_tokens(model: CausalLM, texts: int) -> str:
    return f"the tokens of {texts} texts" + (" and of a chat with tools and reasoning" if model.is_chat else "")
