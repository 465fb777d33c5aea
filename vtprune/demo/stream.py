"""An answer token by token, computed only while somebody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from vtprune.stopwatch import timer

__all__ = ["TokenStream"]


class _Closed(Exception):
    """Raised inside `generate` when nobody waits any more."""


class TokenStream:
    """`model.generate` in a thread of its own, held after every token until the next one is asked for.

    Of several streams that are asked in turn only one computes at any time, so that their times compare.

    Args:
        model: of this stream alone.
        inputs: of one sample, as the processor made them.
        options: of `generate`, beside greedy decoding.

    Attributes:
        ids: the new tokens so far.
        seconds: what each of them took; the first holds tower and prefill.
        finished: there is no next one.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], **options: Any) -> None:
        self._model, self._inputs, self._options = model, inputs, options
        self._asked, self._answers = threading.Semaphore(0), SimpleQueue[int | None]()
        self._closed = self._prompt_seen = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="vtprune-answer")
        self._future: Future[None] | None = None
        self.ids: list[int] = []
        self.seconds: list[float] = []
        self.finished = False

    def step(self) -> int | None:
        """The next token, or None if the answer is finished.

        Raises:
            Exception: what `generate` raised.
        """
        if self.finished:
            return None
        start = timer()
        if self._future is None:
            self._future = self._executor.submit(self._run)
            self._future.add_done_callback(lambda _: self._answers.put(None))
        self._asked.release()
        token = self._answers.get()
        if token is None:
            self.finished = True
            self._executor.shutdown()
            self._future.result()
            return None
        self.seconds.append(timer() - start)
        self.ids.append(token)
        return token

    def close(self) -> None:
        """Give up: `generate` ends before its next token. Calling it twice is harmless."""
        self._closed = True
        self._asked.release()
        self._executor.shutdown()

    def _run(self) -> None:
        import torch

        self._asked.acquire()
        if self._closed:
            return
        try:
            with torch.no_grad():
                self._model.generate(**self._inputs, streamer=self, do_sample=False, num_beams=1, **self._options)
        except _Closed:
            return

    # what transformers calls

    def put(self, value: Any) -> None:
        """Takes the prompt first, then every new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._answers.put(int(value.reshape(-1)[-1]))
        self._asked.acquire()
        if self._closed:
            raise _Closed

    def end(self) -> None:
        """The answer is whole; the thread's end says so."""
