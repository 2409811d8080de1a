"""One streamed answer: from tokens to the pieces of text, tool calls and log-probabilities that a client gets."""

import dataclasses
import json
import uuid

from engine.generation import TextStream
from engine.session import ReplyStream, Session, call_of
from engine.tools import Tool, run_calls
from server.schema import ChatRequest, Request


class Newlines:
    """Holds back newlines at the end of a streamed text until more text follows; may drop those at its beginning."""

    def __init__(self):
        self.held, self.started = "", False

    def put(self, text: str, drop_first: bool) -> str:
        text = self.held + text
        if drop_first and not self.started:
            text = text.lstrip("\n")
        released = text.rstrip("\n")
        self.held = text[len(released) :]
        self.started |= bool(released)
        return released


class StopStrings:
    """Holds back the end of a streamed text while it may become a stop string."""

    def __init__(self, stops: list[str]):
        self.stops, self.held, self.found = stops, "", False
        self.longest = max(map(len, stops), default=1)

    def put(self, text: str) -> str:
        """Returns the text that can be sent. When a stop string is `found`, this is all text before it."""
        self.held += text
        starts = [start for start in map(self.held.find, self.stops) if start >= 0]
        self.found = bool(starts)
        if self.found:
            end = min(starts)
        else:
            end = max(len(self.held) - self.longest + 1, 0)
            while not any(stop.startswith(self.held[end:]) for stop in self.stops) and end < len(self.held):
                end += 1
        released, self.held = self.held[:end], self.held[end:]
        return released


class Answer:
    """A choice of a response, streamed or not, as a sequence of pieces: dicts of what is new, with OpenAI's names.

    A piece may have content, reasoning_content, tool_calls, tool_runs (calls of the server's own tools) and logprobs.
    """

    def __init__(
        self, index: int, session: Session, request: Request, prompt: list[int], tools: dict[str, Tool] | None = None
    ):
        """tools: the server's own, called by run_tools."""
        self.index, self.session, self.request, self.tools = index, session, request, tools or {}
        seed = request.seed if request.seed is None or not index else f"{request.seed}/{index}"
        self.sequence = session.sequence(prompt, seed)
        self.sequence.n_top = request.n_top
        self.is_chat = isinstance(request, ChatRequest)  # else the answer is one text without parts
        self.echo = not self.is_chat and request.echo
        self.sequence.echo = self.echo and request.n_top is not None
        if self.is_chat and not (self.tools or request.offered_tools):
            self.sequence.suppress_tokens |= set(session.tokenizer.tags.get("tool_call", ())[:1])  # nobody would answer
        self.stream = ReplyStream(session.tokenizer, prompt) if self.is_chat else TextStream(session.tokenizer)
        self.pieces = session.tokenizer.pieces
        constraint = self.sequence.constraint
        if constraint and not self.is_chat:
            constraint.tags = None  # the text would contain the thought
        is_document = constraint and constraint.trigger is None
        self.stops = StopStrings([] if is_document else request.stop)  # no stop string cuts a document
        self.content, self.reasoning = Newlines(), Newlines()
        self.n_prompt = len(prompt)
        self.n_tokens = 0  # generated in all turns
        self.n_reasoning = 0  # of them in reasoning
        self.position = -1  # of the last of them in self.sequence.tokens
        self.n_calls = 0  # tool calls found so far
        self.called = False  # whether the client has to run a tool
        self.to_run: list[dict] = []  # calls of the server's own tools in the turn that has ended
        self.length = 0  # of the content, sent or held back, in characters
        self.log_probs: list[tuple[int, dict]] = []  # not yet sent: (where the token starts in the content, entry)
        self.finish_reason: str | None = None

    def put(self, token: int, finish_reason: str | None) -> dict:
        """The piece for the next token of self.sequence, which may be {}. finish_reason: the engine's.

        If to_run contains calls afterwards, the answer continues with run_tools().
        """
        piece = self._prompt_piece() if self.echo and not self.n_tokens else {}
        if not self.request.max_new_tokens:
            self.finish_reason = "length"
            return piece
        self.n_tokens += 1
        self.position += 1
        start = self.length
        part, text = self._read(token)
        if part == "content":
            self._add_content(piece, text)
            if self.request.n_top is not None and (self.pieces[token] or self.echo):
                sequence, i = self.sequence, self.position
                top = sequence.top_log_probs[i] if self.request.n_top else []
                self.log_probs.append((start, self._entry(token, sequence.log_probs[i], top, start)))
        elif part == "reasoning":
            self.n_reasoning += 1
            text = "\n" + text if token == self.session.think else text  # between two blocks, as in ReplyStream.reply
            append(piece, "reasoning_content", self.reasoning.put(text, drop_first=True))
        if self.is_chat:
            self._find_calls(piece, is_open=part == "tool_call")
        ended = finish_reason == "stop" and token == self.session.tokenizer.end_of_turn
        if self.tools and ended and not self.stops.found:
            self.to_run = self.session.last_reply(self.sequence.tokens).tool_calls
        is_enough = self.called and not self.request.parallel_tool_calls
        if self.stops.found or is_enough or (finish_reason and not self.to_run):
            self._end(piece, finish_reason or "stop")
        sent = self.length - len(self.stops.held) - len(self.content.held)
        is_whole = self.echo and self.finish_reason and not self.stops.found  # then the last token may be without text
        while self.log_probs and (self.log_probs[0][0] < sent or is_whole):
            append(piece, "logprobs", [self.log_probs.pop(0)[1]])
        return piece

    def run_tools(self) -> dict:
        """Runs the calls, which may take seconds; returns their piece. The answer continues with a new self.sequence,
        or ends if no tokens are left."""
        calls, self.to_run = self.to_run, []
        results = run_calls(self.tools, calls)
        ids = self.session.tokenizer.tool_responses(results)
        for token in ids:
            self.stream.put(token)
        old = self.sequence
        room = old.max_new_tokens - len(old.tokens) - len(ids)
        if room > 0:
            prompt = [*old.prompt, *old.tokens, *ids]
            self.sequence = dataclasses.replace(self.session.sequence(prompt), max_new_tokens=room, n_top=old.n_top)
            self.sequence.random, self.position = old.random, -1
        else:
            self.finish_reason = "length"
        return {"tool_runs": [dict(call, result=result) for call, result in zip(calls, results)]}

    def _read(self, token: int) -> tuple[str, str]:
        return self.stream.put(token) if self.is_chat else ("content", self.stream.put(token))

    def _add_content(self, piece: dict, text: str):
        self.length += len(text)
        if not self.stops.found:
            self._release_content(piece, self.stops.put(text))

    def _release_content(self, piece: dict, text: str):
        has_reasoning = self.is_chat and any(part == "reasoning" for part, _ in self.stream.pieces)
        append(piece, "content", self.content.put(text, drop_first=has_reasoning))

    def _find_calls(self, piece: dict, is_open: bool):
        """Adds finished calls; text that is not a valid call goes to the content unchanged."""
        texts = [text for part, text in self.stream.pieces if part == "tool_call"]
        ended = texts[:-1] if is_open else texts
        for text in [] if self.tools else ended[self.n_calls :]:
            call = call_of(text)
            if isinstance(call.get("name"), str):
                arguments = call.get("arguments", {})
                arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                function = {"name": call["name"], "arguments": arguments}
                call = {"index": self.n_calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                append(piece, "tool_calls", [call | {"function": function}])
                self.called = True
            else:
                self._add_content(piece, f"<tool_call>{text}</tool_call>")
        self.n_calls = len(ended)

    def _end(self, piece: dict, finish_reason: str):
        """Releases the text that was held back."""
        if not self.stops.found:
            part, text = self.stream.end() if self.is_chat else ("content", self.stream.end())
            if part == "tool_call":  # truncated
                text = "<tool_call>" + self.stream.pieces[-1][1]
            if part in ("content", "tool_call"):
                self._add_content(piece, text)
        if not self.stops.found:
            held, self.stops.held = self.stops.held, ""
            self._release_content(piece, held)
        if not self.called:
            append(piece, "content", self.content.held)
        self.content.held = ""
        finished = "stop" if self.stops.found else finish_reason
        self.finish_reason = "tool_calls" if self.called and finished == "stop" else finished

    def _prompt_piece(self) -> dict:
        """The prompt's text and, if wanted, its log-probabilities; the first token has none."""
        text, entries = "", []
        log_probs, tops = [None, *self.sequence.prompt_log_probs], [[], *self.sequence.prompt_top_log_probs]
        for i, token in enumerate(self.sequence.prompt):
            if self.request.n_top is not None:
                entries.append(self._entry(token, log_probs[i], tops[i], len(text)))
            text += self.stream.put(token)
        self.length = len(text)
        return {"content": text, "logprobs": entries}

    def _entry(self, token: int, log_prob: float | None, top: list[tuple[int, float]], start: int) -> dict:
        """A token in the chat endpoint's format of log-probabilities, and where it starts in the content."""

        def entry(token: int, log_prob: float | None) -> dict:
            piece = self.pieces[token] or self.session.tokenizer.id_to_token(token).encode()
            log_prob = log_prob if log_prob is None else max(log_prob, -9999.0)
            return {"token": piece.decode("utf-8", "replace"), "logprob": log_prob, "bytes": [*piece]}

        return entry(token, log_prob) | {"top_logprobs": [entry(*pair) for pair in top], "start": start}


def append(piece: dict, name: str, new: str | list):
    """Appends to a field of a piece."""
    if new:
        piece[name] = piece[name] + new if name in piece else new
