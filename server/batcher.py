"""The thread that runs an engine: sequences are added and removed between two steps, and share the batch.

The engine and the event loop take turns: after handing tokens over, the engine waits until they are sent, so that
neither waits for the interpreter's lock several times per token. The tokens of fast steps are handed over together.
"""

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Callable

from engine.generation import Engine, Sequence
from model.model import CausalLM

INTERVAL = 0.02  # seconds between two times that tokens are handed over; an answer's first and last are not held back
MAX_WAIT = 0.1  # seconds that the engine waits for the event loop to send the tokens

Receive = Callable[[int | Exception, str | None], None]  # a token, and with the last the finish_reason; or an error


class Batcher:
    """Generates sequences. Its methods are called in the event loop's thread, which also receives the tokens."""

    def __init__(self, model: CausalLM, max_rows: int):
        self.model, self.max_rows = model, max_rows
        self.loop = asyncio.get_running_loop()
        self.orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # run between two steps
        self.receivers: dict[Sequence, Receive] = {}  # of those that have not ended
        self.sent = threading.Event()  # all tokens that were handed over
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, sequence: Sequence, receive: Receive):
        self.receivers[sequence] = receive
        self.orders.put(lambda: self.engine.submit(sequence))

    def remove(self, sequence: Sequence):
        """Stops it, if it has not ended: its row is free at the next step, and no more tokens are received."""
        if self.receivers.pop(sequence, None):
            self.orders.put(lambda: self.engine.remove(sequence))

    def close(self):
        """Ends the thread after its current step."""
        self.orders.put(None)
        self.thread.join()

    @property
    def running(self) -> int:
        """Rows in use."""
        return min(len(self.receivers), self.max_rows)

    @property
    def waiting(self) -> int:
        return len(self.receivers) - self.running

    def _run(self):
        self.engine = Engine(self.model, self.max_rows)
        events, handed_over = [], 0.0
        while True:
            while not self.engine.busy or not self.orders.empty():
                order = self.orders.get()
                if order is None:
                    return
                order()
            try:
                new = [(sequence, sequence.tokens[-1], sequence.finish_reason) for sequence in self.engine.step()]
            except Exception as error:  # such as out of memory: all current sequences are lost, later ones are not
                traceback.print_exc()
                lost = [*self.engine.rows, *self.engine.waiting]
                self.engine = Engine(self.model, self.max_rows)
                new = [(sequence, error, "error") for sequence in lost]
            events += new
            is_urgent = any(finish_reason or len(sequence.tokens) == 1 for sequence, _, finish_reason in new)
            if not is_urgent and time.monotonic() < handed_over + INTERVAL:
                continue
            self.sent.clear()
            try:
                self.loop.call_soon_threadsafe(self._deliver, events)
            except RuntimeError:  # the loop has ended
                return
            self.sent.wait(MAX_WAIT)
            events, handed_over = [], time.monotonic()

    def _deliver(self, events: list[tuple[Sequence, int | Exception, str | None]]):
        for sequence, token, finish_reason in events:
            receive = self.receivers.get(sequence)
            if receive is None:  # removed during the step
                continue
            if finish_reason:
                del self.receivers[sequence]
            receive(token, finish_reason)
        self.loop.call_soon(self.sent.set)  # after the tasks that were waiting for these tokens
