"""Compiled grammars of one model: made on a thread of their own, kept while they are in use."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from atom_cluster.errors import ConfigError, InvalidRequest
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.grammar import CompiledGrammar, compile_grammar
from atom_cluster.structured.vocabulary import Vocabulary, load_vocabulary

_log = logging.getLogger(__name__)

_CAPACITY = 32
"""Compiled grammars kept for whoever asks again; a large one has some 10 MB. Ranks keep what their engine says
(`held.HeldGrammars`), and so hardly any here."""


class GrammarCompiler:
    """Compiles specs, each once while it is kept. Thread-safe.

    A thread and not a process: the library gives up at limits of its own, so a compilation cannot go on for ever, and
    it lets go of the interpreter lock. A process would have to have the vocabulary a second time.
    """

    def __init__(self, load: Callable[[], Vocabulary], *, capacity: int = _CAPACITY) -> None:
        """load: makes the vocabulary, when it is first needed."""
        self._load = load
        self._capacity = capacity
        self._lock = threading.RLock()
        self._kept: OrderedDict[tuple[str, str], Future[CompiledGrammar]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")

    @classmethod
    def for_model(cls, directory: str | Path, vocab_size: int, *, capacity: int = _CAPACITY) -> GrammarCompiler:
        """For the model in a directory in Hugging Face layout."""
        return cls(lambda: load_vocabulary(directory, vocab_size), capacity=capacity)

    def warm_up(self) -> None:
        """Make the vocabulary now, which holds the interpreter lock for a second with large ones. Logs a failure, which
        then meets every request that has a grammar."""
        try:
            self._load()
        except (ConfigError, InvalidRequest) as exc:
            _log.warning("there is no structured output: %s", exc)

    def submit(self, spec: GrammarSpec) -> Future[CompiledGrammar]:
        """The compiled grammar, or the error, once it is there. `spec.after` makes no difference."""
        key = (spec.kind, spec.text)
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = self._pool.submit(lambda: compile_grammar(spec, self._load()))
                found.add_done_callback(lambda future: self._forget_failure(key, future))
                while len(self._kept) > self._capacity:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(key)
            return found

    def close(self) -> None:
        """End the thread, once it has finished what it does; what has not begun is cancelled. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _forget_failure(self, key: tuple[str, str], future: Future[CompiledGrammar]) -> None:
        """On the pool's thread, or on the submitting one, which holds the lock, if the work is done by then."""
        with self._lock:
            if self._kept.get(key) is future and (future.cancelled() or future.exception() is not None):
                del self._kept[key]
