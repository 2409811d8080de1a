"""One answer as it comes: tokens to the pieces of text, calls and log-probabilities that a client gets."""

import dataclasses
import json
import uuid

from engine.generation import TextStream
from engine.session import ReplyStream, Session, call_of, last_turn, read_tokens
from engine.tools import Tool, run_calls
from model.chat import IM_END, SPECIAL_TOKENS, THINK, TOOL_CALL, token_pieces
from server.schema import ChatRequest, Request


class Newlines:
    """Holds back the newlines at the end of a text until more of it comes; drops those at the beginning if told so."""

    def __init__(self):
        self.held, self.begun = "", False

    def put(self, text: str, drop_first: bool) -> str:
        text = self.held + text
        if drop_first and not self.begun:
            text = text.lstrip("\n")
        released = text.rstrip("\n")
        self.held = text[len(released) :]
        self.begun |= bool(released)
        return released


class StopStrings:
    """Holds back the end of a text as long as it may become a stop string."""

    def __init__(self, stops: list[str]):
        self.stops, self.held, self.found = stops, "", False

    def put(self, text: str) -> str:
        """What can be told of the text. Once a stop string is `found`, all before it has been told."""
        self.held += text
        places = [place for place in map(self.held.find, self.stops) if place >= 0]
        self.found = bool(places)
        if self.found:
            end = min(places)
        else:
            ends = (n for stop in self.stops for n in range(len(stop) - 1, 0, -1) if self.held.endswith(stop[:n]))
            end = len(self.held) - max(ends, default=0)
        released, self.held = self.held[:end], self.held[end:]
        return released


class Answer:
    """A choice of a response. Streamed or not, it is made of the same pieces: dicts of what is new, by OpenAI's names.

    A piece may hold content, reasoning_content, tool_calls, tool_runs (of the server's own tools) and logprobs.
    """

    def __init__(
        self, index: int, session: Session, request: Request, prompt: list[int], tools: dict[str, Tool] | None = None
    ):
        """tools: the server's own, which run_tools calls."""
        self.index, self.session, self.request, self.tools = index, session, request, tools or {}
        seed = request.seed if request.seed is None or not index else f"{request.seed}/{index}"
        self.sequence = session.sequence(prompt, seed)
        self.sequence.n_top = request.n_top
        self.is_chat = isinstance(request, ChatRequest)  # else prompt and answer are one text, without parts
        if self.is_chat and not (self.tools or request.offered_tools):
            self.sequence.suppress_tokens |= {TOOL_CALL}  # nobody could answer it
        self.stream = ReplyStream(session.tokenizer) if self.is_chat else TextStream(session.tokenizer)
        self.pieces = token_pieces(session.tokenizer)
        self.stops, self.content, self.thought = StopStrings(request.stop), Newlines(), Newlines()
        self.n_prompt = len(prompt)
        self.n_tokens = 0  # that the model has written, in all turns
        self.place = -1  # of the last of them in self.sequence.tokens
        self.n_calls = 0  # that were found in them
        self.called = False  # whether the client is to run a tool
        self.to_run: list[dict] = []  # calls of the server's own tools in the turn that has ended
        self.length = 0  # of the content, told or held back, in characters
        self.log_probs: list[tuple[int, dict]] = []  # untold: where in the content a token begins, what is said of it
        self.finish_reason: str | None = None

    def put(self, token: int, finish_reason: str | None) -> dict:
        """The piece that the next token of self.sequence makes, perhaps {}. finish_reason: the engine's.

        Where that leaves calls in to_run, the answer goes on with run_tools().
        """
        self.n_tokens += 1
        self.place += 1
        piece, start = {}, self.length
        part, text = self._read(token)
        if part == "content":
            self._say(piece, text)
            if self.request.n_top is not None and self.pieces[token]:
                self.log_probs.append((start, self._log_probs_of(token, start)))
        elif part == "reasoning":
            text = "\n" + text if token == THINK else text  # between two thoughts, as ReplyStream.reply joins them
            tell(piece, "reasoning_content", self.thought.put(text, drop_first=True))
        if self.is_chat:
            self._find_calls(piece, is_open=part == "tool_call")
        if self.tools and finish_reason == "stop" and token == IM_END and not self.stops.found:
            self.to_run = read_tokens(last_turn(self.sequence.tokens), self.session.tokenizer).tool_calls
        is_enough = self.called and not self.request.parallel_tool_calls
        if self.stops.found or is_enough or (finish_reason and not self.to_run):
            self._end(piece, finish_reason or "stop")
        told = self.length - len(self.stops.held) - len(self.content.held)
        while self.log_probs and self.log_probs[0][0] < told:
            tell(piece, "logprobs", [self.log_probs.pop(0)[1]])
        return piece

    def run_tools(self) -> dict:
        """Calls them, which may take seconds; the piece that says so. Goes on with another self.sequence, or ends."""
        calls, self.to_run = self.to_run, []
        results = run_calls(self.tools, calls)
        ids = self.session.answer_ids(results)
        for token in ids:
            self.stream.put(token)
        old = self.sequence
        room = old.max_new_tokens - len(old.tokens) - len(ids)
        if room > 0:
            prompt = [*old.prompt, *old.tokens, *ids]
            self.sequence = dataclasses.replace(self.session.sequence(prompt), max_new_tokens=room, n_top=old.n_top)
            self.sequence.random, self.place = old.random, -1
        else:
            self.finish_reason = "length"
        return {"tool_runs": [dict(call, result=result) for call, result in zip(calls, results)]}

    def _read(self, token: int) -> tuple[str, str]:
        return self.stream.put(token) if self.is_chat else ("content", self.stream.put(token))

    def _say(self, piece: dict, text: str):
        self.length += len(text)
        if not self.stops.found:
            self._say_at_once(piece, self.stops.put(text))

    def _say_at_once(self, piece: dict, text: str):
        has_thought = self.is_chat and any(part == "reasoning" for part, _ in self.stream.pieces)
        tell(piece, "content", self.content.put(text, drop_first=has_thought))

    def _find_calls(self, piece: dict, is_open: bool):
        """Calls that have ended; what is none goes to the content as it was written."""
        texts = [text for part, text in self.stream.pieces if part == "tool_call"]
        ended = texts[:-1] if is_open else texts
        for text in [] if self.tools else ended[self.n_calls :]:
            call = call_of(text)
            if isinstance(call.get("name"), str):
                arguments = call.get("arguments", {})
                arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                function = {"name": call["name"], "arguments": arguments}
                call = {"index": self.n_calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                tell(piece, "tool_calls", [call | {"function": function}])
                self.called = True
            else:
                self._say(piece, f"<tool_call>{text}</tool_call>")
        self.n_calls = len(ended)

    def _end(self, piece: dict, finish_reason: str):
        """Tells what was held back."""
        if not self.stops.found:
            part, text = self.stream.end() if self.is_chat else ("content", self.stream.end())
            if part == "tool_call":  # it was cut off
                text = "<tool_call>" + self.stream.pieces[-1][1]
            if part in ("content", "tool_call"):
                self._say(piece, text)
        if not self.stops.found:
            held, self.stops.held = self.stops.held, ""
            self._say_at_once(piece, held)
        if not self.called:
            tell(piece, "content", self.content.held)
        self.content.held = ""
        finished = "stop" if self.stops.found else finish_reason
        self.finish_reason = "tool_calls" if self.called and finished == "stop" else finished

    def _log_probs_of(self, token: int, start: int) -> dict:
        """As a chat says it, and where the token begins."""

        def said(token: int, log_prob: float) -> dict:
            piece = self.pieces[token] or SPECIAL_TOKENS[token].encode()
            return {"token": piece.decode("utf-8", "replace"), "logprob": max(log_prob, -9999.0), "bytes": [*piece]}

        top = self.sequence.top_log_probs[self.place] if self.request.n_top else []
        probabilities = said(token, self.sequence.log_probs[self.place])
        return probabilities | {"top_logprobs": [said(*pair) for pair in top], "start": start}


def tell(piece: dict, name: str, new: str | list):
    """Puts something new into a piece, behind what it has of that name."""
    if new:
        piece[name] = piece[name] + new if name in piece else new
