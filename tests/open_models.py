"""Small open models for tests: byte-level tokenizers, templates that do what those of well-known models do, and random
weights. Nothing of theirs is copied."""

import json
import random
from pathlib import Path

import torch
from helpers import SENTENCES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model.chat import load_tokenizer
from model.checkpoint import save_model
from model.LMConfig import LMConfig
from model.model import CausalLM

# A system prompt of its own, as SmolLM2's; no tools.
PLAIN = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
Be brief.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# Tools and thoughts; thoughts of earlier turns are left out, and the last one is there even if it is empty, as Qwen3's.
THINKING = """{%- if tools %}{{- '<|im_start|>system\n<tools>' }}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools><|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content.strip('\n') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
# A bos, trimmed contents, the date in the system prompt, one call in JSON without tags, as Llama 3.2's.
DATED = """{{- bos_token }}{{- '<|start|>system<|end|>\n\nToday: ' + strftime_now('%d %b %Y') }}
{%- for tool in tools or [] %}{{- '\n' + tool | tojson(indent=4) }}{% endfor %}
{%- if messages[0].role == 'system' %}{{- '\n\n' + messages[0].content | trim }}{% endif %}
{{- '<|eot|>' }}
{%- for message in messages if message.role != 'system' %}
    {{- '<|start|>' + message.role + '<|end|>\n\n' }}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{% endif %}"""
# The answer ends with the token that ends a text, and a system message raises, as Mistral's.
INSTRUCT = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
{%- else %}{{- raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"""
TEMPLATES = {"plain": PLAIN, "thinking": THINKING, "dated": DATED, "instruct": INSTRUCT}
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "[INST]", "[/INST]"]
TAGS = [f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response") for slash in ("", "/")]
BOS = {"dated", "instruct"}  # formats with a bos


def write_tokenizer(folder: Path, name: str | None = "plain", controls: list[str] = CONTROLS) -> Path:
    """A byte-level tokenizer with the template of this name; None: without a template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # As in Qwen's, tags are tokens but not special ones: the library would find them in a user's text.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    if name in BOS:
        bos = [("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
        tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=bos)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = {"dated": "<|eot|>", "instruct": "<|endoftext|>"}.get(
        name, controls[-1] if len(controls) < 3 else "<|im_end|>"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": eos}
    config |= {"clean_up_tokenization_spaces": False} | ({"chat_template": TEMPLATES[name]} if name else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


TOOL = {"type": "function", "function": {"name": "weather", "description": "now <here>", "parameters": {}}}


def make_chats(
    number: int, seed: int = 0, system: bool = True, tools: bool = True
) -> list[tuple[list[dict], list | None]]:
    """Messages and tools of made-up chats: of one or several turns, with thoughts, with a call of a tool."""
    rng, chats = random.Random(seed), []
    for i in range(number):
        messages = [{"role": "system", "content": rng.choice(SENTENCES)}] if system and i % 3 == 0 else []
        for _ in range(1 + i % 3):
            messages.append({"role": "user", "content": rng.choice(SENTENCES)})
            if tools and i % 4 == 1:
                call = {
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": rng.choice(SENTENCES)}},
                }
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "content": rng.choice(SENTENCES)})
            messages.append({"role": "assistant", "content": rng.choice(SENTENCES)})
            if i % 4 == 2:
                messages[-1]["reasoning_content"] = rng.choice(SENTENCES)
        chats.append((messages, [TOOL] if tools and i % 4 == 1 else None))
    return chats


SPARE_ROWS = 6  # of the embedding, beyond the tokens


def write_model(
    folder: Path, name: str | None = "thinking", is_chat: bool = True, hidden_size: int = 32, seed: int = 0
) -> Path:
    """A small Llama of random weights with the tokenizer of this template."""
    write_tokenizer(folder, name)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    sizes = dict(hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = CausalLM(
        LMConfig(
            vocab_size=tokenizer.get_vocab_size() + SPARE_ROWS,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.eos,
            eos_token_id=tokenizer.eos,
            qk_norm=False,
            **sizes,
        )
    )
    model.stop_token_ids = [tokenizer.end_of_turn, tokenizer.eos] if is_chat else [tokenizer.eos]
    save_model(folder, model, folder)
    return folder


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path
