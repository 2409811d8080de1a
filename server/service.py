"""From a request to the pieces of its answers, and the figures of /metrics."""

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from base.cli import UserError, one_line
from engine.grammar import Grammar, compile_grammar
from engine.session import Session
from engine.tools import Tool
from server.answer import Answer
from server.guard import Refusal
from server.models import Served
from server.schema import ChatRequest, CompletionRequest, Request

MAX_COMPILING = 16  # grammars of requests that are being compiled or wait for it


@dataclass(frozen=True)
class ServerConfig:
    """The flags of serve.py."""

    host: str
    allowed_origins: tuple[str, ...]
    allowed_hosts: tuple[str, ...]
    api_key: str | None
    weight_dtype: str  # of the matrices, on a CPU
    max_rows: int  # of each model, as are the next three
    max_queue: int
    max_new_tokens: int
    request_timeout: float  # seconds


class Metrics:
    """The figures that /metrics gives to Prometheus."""

    def __init__(self):
        self.registry = CollectorRegistry()
        options = dict(registry=self.registry, namespace="jiezi")
        self.requests = Counter("requests", "answered requests, by outcome", ["model", "end"], **options)
        self.refused = Counter("refused_requests", "refused requests, by status", ["status"], **options)
        self.tokens = Counter("tokens", "tokens of prompts and completions", ["model", "kind"], **options)
        self.rows = Gauge("rows", "answers, by state", ["model", "state"], **options)
        self.first = Histogram("first_token_seconds", "from a request to its first token", ["model"], **options)

    def text(self, models: dict[str, Served]) -> bytes:
        for name, served in models.items():
            if served.batcher:
                self.rows.labels(name, "running").set(served.batcher.running)
                self.rows.labels(name, "waiting").set(served.batcher.waiting)
        return generate_latest(self.registry)


class Service:
    """What the routes do: from a request to the pieces of its answers."""

    def __init__(self, models: dict[str, Served], config: ServerConfig, device: torch.device, tools: dict[str, Tool]):
        self.models, self.config, self.device, self.tools = models, config, device, tools
        self.capacity = config.max_rows + config.max_queue  # of each model
        self.tool_threads = ThreadPoolExecutor(8, "tools")  # separate: a tool may take seconds
        self.grammar_threads = ThreadPoolExecutor(2, "grammars")  # and so may a grammar
        self.n_compiling = 0
        self.metrics = Metrics()

    def model(self, name: str) -> Served:
        served = self.models.get(name) if name else next(iter(self.models.values()))
        if served is None:
            known = ", ".join(self.models)
            raise Refusal(404, f"there is no model {name[:100]}; there are {known}", "model_not_found", "model")
        return served

    async def answers(self, request: Request) -> tuple[Served, list[Answer]]:
        """The answers to generate, with their prompts. Refusal if the request cannot be answered."""
        served = self.model(request.model)
        if isinstance(request, ChatRequest) and not served.is_chat:
            message = f"{served.name} is a base model, which continues texts: ask /v1/completions"
            raise Refusal(400, message, param="model")
        wanted = request.n * (1 if isinstance(request, ChatRequest) else len(request.prompt))
        if wanted > self.capacity:
            raise Refusal(400, f"one request may have {self.capacity} answers, not {wanted}", param="n")
        try:
            await served.open(self.device, self.config.weight_dtype, self.config.max_rows)
        except UserError as error:
            raise Refusal(500, str(error)) from None
        grammar = await self._grammar(served, request)
        return served, await asyncio.to_thread(self._prepare, served, request, grammar)

    async def _grammar(self, served: Served, request: Request) -> Grammar | None:
        """What the answers have to fit."""

        def compiled() -> Grammar | None:
            tags = served.tokenizer.tags.get("tool_call")
            structure = request.structure(tags)
            if structure is None:
                return None
            return compile_grammar(served.tokenizer, structure[0], tags[0] if structure[1] else None)

        if not request.is_structured:
            return None
        if self.n_compiling >= MAX_COMPILING:
            raise Refusal(429, "too many schemas and grammars are being compiled: try again in a moment")
        self.n_compiling += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.grammar_threads, compiled)
        except (UserError, ValueError, RecursionError) as error:
            raise Refusal(400, one_line(error)) from None
        finally:
            self.n_compiling -= 1

    def _prepare(self, served: Served, request: Request, grammar: Grammar | None) -> list[Answer]:
        config = request.generation_config(min(self.config.max_new_tokens, served.context), served.sampling)
        session = Session(served.batcher.model, served.tokenizer, config, grammar=grammar)
        tools = {}
        if isinstance(request, CompletionRequest):
            texts = request.prompt
            given = [served.tokenizer.text_prompt(text) if isinstance(text, str) else text for text in texts]
        else:
            tools = {} if request.tools or request.tool_choice == "none" or grammar else self.tools
            schemas = request.offered_tools or [tool.schema for tool in tools.values()]
            try:
                if request.continue_final_message:
                    ids, _ = served.tokenizer.documents(request.chat(), schemas)[-1]
                    given = [ids[: -1 - ids[::-1].index(served.tokenizer.end_of_turn)]]
                else:
                    given = [served.tokenizer.prompt(request.chat(), schemas, think=config.think != "off")]
            except ValueError as error:
                raise Refusal(400, str(error), param="messages") from None
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        for ids in given:
            if not ids or max(ids) >= served.tokenizer.get_vocab_size():
                raise Refusal(400, "a prompt has at least one token, and none beyond the vocabulary", param=param)
            if len(ids) >= served.context:
                # litellm and others look for these words.
                message = f"This model's maximum context length is {served.context} tokens"
                message += f"; the prompt has {len(ids)}: shorten it"
                raise Refusal(400, message, "context_length_exceeded", param)
        prompts = [ids for ids in given for _ in range(request.n)]
        answers = [Answer(index, session, request, ids, tools) for index, ids in enumerate(prompts)]
        for answer in answers if grammar else []:
            try:
                answer.sequence.constraint.check_room(min(config.max_new_tokens, served.context - answer.n_prompt))
            except UserError as error:
                raise Refusal(400, str(error), param="max_tokens") from None
        return answers

    async def generate(self, served: Served, answers: list[Answer]) -> AsyncGenerator[tuple[Answer, dict], None]:
        """Streams (answer, piece) pairs. The first piece is empty: it says that all answers are queued.

        Refusal if the queue is full, and if an answer fails or takes too long.
        """
        if served.n_answers + len(answers) > self.capacity:
            raise Refusal(429, "the queue is full: try again in a moment")
        served.n_answers += len(answers)
        came = asyncio.Queue()  # (answer, token, finish_reason); (None, TimeoutError(), None) when the time is over
        start, end, has_begun = time.perf_counter(), "left", False

        def begin(answer: Answer):
            served.batcher.submit(answer.sequence, lambda *token: came.put_nowait((answer, *token)))

        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.config.request_timeout, came.put_nowait, (None, TimeoutError(), None))
        for answer in answers:
            begin(answer)
        try:
            yield answers[0], {}
            while not all(answer.finish_reason for answer in answers):
                answer, token, finish_reason = await came.get()
                if isinstance(token, TimeoutError):
                    raise Refusal(504, f"not finished after {self.config.request_timeout:g} seconds", "timeout")
                if isinstance(token, Exception):
                    raise Refusal(500, f"the engine failed: {type(token).__name__}")
                if answer.finish_reason:  # by a stop string, while the engine continued
                    continue
                if not has_begun:
                    has_begun = True
                    self.metrics.first.labels(served.name).observe(time.perf_counter() - start)
                yield answer, answer.put(token, finish_reason)
                if answer.to_run:
                    yield answer, await loop.run_in_executor(self.tool_threads, answer.run_tools)
                    if not answer.finish_reason:
                        begin(answer)
                elif answer.finish_reason:
                    served.batcher.remove(answer.sequence)
            end = "finished"
        except Refusal:
            end = "failed"
            raise
        finally:
            timer.cancel()
            served.n_answers -= len(answers)
            for answer in answers:
                served.batcher.remove(answer.sequence)
            self.metrics.requests.labels(served.name, end).inc()
            counts = usage(answers)
            for kind in ("prompt", "completion"):
                self.metrics.tokens.labels(served.name, kind).inc(counts[f"{kind}_tokens"])


def usage(answers: list[Answer]) -> dict:
    n = answers[0].request.n
    prompt = sum(answer.n_prompt for answer in answers[::n])  # n answers share a prompt
    completion = sum(answer.n_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
