"""Steps with prompts, in pieces: what works on each token alone is captured in graphs, what mixes tokens is not.

Between two attentions a model's layers are a function of the tokens' hidden states, whatever rows they belong to; its
kernels are many and, for a few hundred tokens, short. So is what writes keys and values, given each token's slot. So a
forward pass is recorded once for a number of tokens: when a layer asks to mix tokens, the capture ends there, the call
is noted, and another capture begins behind it. A step of so many tokens or fewer then replays graph by graph, and makes
the calls in between for its own rows. Knows no sampling.
"""

from __future__ import annotations

import bisect
import inspect
import logging
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
import torch

from atom_cluster.layers.forward_batch import ForwardBatch, LayerInputs
from atom_cluster.messages.steps import RowStep
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.table import OpTable
from atom_cluster.runner.capture import capture_stream, captured, without_owning
from atom_cluster.runner.inputs import InputBuilder
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.step_layout import lay_out

P = TypeVar("P")

_log = logging.getLogger(__name__)

_PER_TOKEN = re.compile(r"_T[A-Z0-9]*$")
"""Names of parameters, and of fields of what they are, that have a row per token: the suffix is the convention of all
ops."""
_PER_TOKEN_METHODS = frozenset({"store"})
"""Methods of plans that mix nothing: what they do with a token follows from the token and its slot, and of the plan's
tensors they read no others. Graphs outlive these."""
_NUM_TIMINGS = 3
_GAIN, _MAX_FILL = 0.95, 1.5
"""Of the next size's time, over a size's own, to take its place, as less may be chance; and of the number of tokens."""


class CannotDivideError(RuntimeError):
    """A layer looks at a step's rows outside of what mixes tokens, or something mixes in a way that is not foreseen."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a plan's method."""

    key: Hashable
    make: Callable[[LayerInputs], object]
    name: str
    arguments: tuple[_Argument, ...]
    options: Mapping[str, _Argument]
    result: torch.Tensor | None

    def run(self, inputs: LayerInputs, num_tokens: int) -> None:
        """Make it for the step at hand, of which only so many tokens are there."""
        method = getattr(inputs.mixer(self.key, self.make), self.name)
        arguments = [x.of_first(num_tokens, inputs) for x in self.arguments]
        options = {name: x.of_first(num_tokens, inputs) for name, x in self.options.items()}
        result = method(*arguments, **options)
        if self.result is not None:
            self.result[:num_tokens].copy_(result)


@dataclass(frozen=True, slots=True)
class _Argument:
    """Of a call, for as many tokens as were recorded."""

    value: Any
    is_per_token: bool = False
    fields: tuple[str, ...] = ()
    """Those that have a row per token."""

    @classmethod
    def of(cls, name: str, value: object) -> _Argument:
        """name: the parameter's."""
        if isinstance(value, torch.Tensor):
            return cls(without_owning(value), is_per_token=_PER_TOKEN.search(name) is not None)
        return cls(value, fields=_per_token_fields(cast("Hashable", type(value))))

    def of_first(self, num_tokens: int, inputs: LayerInputs) -> object:
        """What there is in it for the first tokens of a pass."""
        value, names = self.value, self.fields
        if self.is_per_token:
            return value[:num_tokens]
        if not names:
            return value
        # Many layers may be given the same.
        return inputs.once(
            (_Call, id(value)), lambda: replace(value, **{x: getattr(value, x)[:num_tokens] for x in names})
        )


@cache
def _per_token_fields(kind: Hashable) -> tuple[str, ...]:
    if not is_dataclass(kind):
        return ()
    return tuple(field.name for field in fields(kind) if _PER_TOKEN.search(field.name))


@cache
def _parameter_names(method: Hashable) -> tuple[str, ...]:
    return tuple(inspect.signature(cast("Callable[..., object]", method)).parameters)[1:]


@dataclass(slots=True)
class _Recording:
    """A forward pass over a fixed number of tokens."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: Mapping[int | None, torch.Tensor]
    """By window, [T]."""
    spare_slots: Mapping[int | None, torch.Tensor]
    """Those of tokens that are not there: of the row that stands for none."""
    parts: list[torch.cuda.CUDAGraph | _Call]
    hidden: torch.Tensor
    """[T, D], in memory that the next pass overwrites."""

    def place(self, batch: ForwardBatch) -> None:
        """The step's tokens, and where they go."""
        num_tokens = len(batch.token_ids)
        # Ids and positions behind them are left from an earlier step: as good as anything.
        self.token_ids[:num_tokens].copy_(batch.token_ids)
        self.positions[:num_tokens].copy_(batch.positions)
        for window, slot_T in self.slots.items():
            slot_T[:num_tokens].copy_(batch.attention[window].slot)
            slot_T[num_tokens:].copy_(self.spare_slots[window][num_tokens:])


@dataclass(frozen=True, slots=True, kw_only=True)
class _PassTimes:
    """Milliseconds."""

    issue_ms: float
    """Of the host, to launch it kernel by kernel."""
    device_ms: float
    """Of the device, in pieces."""

    @property
    def waits_for_launches(self) -> bool:
        """Whether the device would have to, kernel by kernel."""
        return self.device_ms < self.issue_ms


def _without_slow_ones(times: Mapping[int, _PassTimes], agree: Callable[[bool], bool]) -> list[int]:
    """Sizes, ascending, but for those that the next is faster than: on an H200, a prompt of 448 tokens took Llama-8B
    16.5 ms to its first token and one of 512 took 13.4."""
    kept: list[int] = []
    for size in sorted(times, reverse=True):
        own, larger = times[size], kept[-1] if kept else None
        is_slow = larger is not None and larger <= _MAX_FILL * size and times[larger].device_ms < _GAIN * own.device_ms
        if not agree(is_slow):
            kept.append(size)
    return kept[::-1]


class _Recorder:
    """Takes a forward pass apart while it is recorded."""

    def __init__(self, actual: LayerInputs, pool: Any) -> None:
        self._actual = actual
        self._pool = pool
        self.parts: list[torch.cuda.CUDAGraph | _Call] = []
        self._results: dict[Hashable, torch.Tensor] = {}
        self._open = ExitStack()

    def begin(self) -> None:
        """Capture from here on."""
        graph = torch.cuda.CUDAGraph()
        self.parts.append(graph)
        self._open.enter_context(captured(graph, self._pool))

    def end(self) -> None:
        """Until here."""
        self._open.close()

    def fail(self, *error: Any) -> None:
        """Something was raised: end the capture, if one is open."""
        self._open.__exit__(*error)

    def call(
        self, key: Hashable, make: Callable[[LayerInputs], object], name: str, *arguments: object, **options: object
    ) -> torch.Tensor | None:
        """Make the call outside of the capture, on rows that stand for none, and note it."""
        method = getattr(self._actual.mixer(key, make), name)
        if not callable(method):
            raise CannotDivideError(f"layers use `{name}` of what mixes tokens")
        if name in _PER_TOKEN_METHODS:
            return cast("torch.Tensor | None", method(*arguments, **options))
        self.end()
        result = method(*arguments, **options)
        if result is not None and not isinstance(result, torch.Tensor):
            raise CannotDivideError(f"`{name}` returns more than a tensor")
        if name == "select":
            raise CannotDivideError("layers choose what they attend to")
        kept = None if result is None else self._result(key, name, result)
        named = zip(_parameter_names(method.__func__), arguments)
        of_call = tuple(_Argument.of(parameter, x) for parameter, x in named)
        by_name = {option: _Argument.of(option, x) for option, x in options.items()}
        self.parts.append(_Call(key, make, name, of_call, by_name, kept))
        self.begin()
        return kept

    def _result(self, key: Hashable, name: str, result: torch.Tensor) -> torch.Tensor:
        """Where results of such calls are left; layer after layer in the same place, as each reads its own at once."""
        place = (key, name, result.shape, result.dtype)
        if place not in self._results:
            self._results[place] = torch.zeros_like(result)
        return self._results[place]


class _Mixer:
    """Stands for a plan while a pass is recorded."""

    def __init__(self, recorder: _Recorder, key: Hashable, make: Callable[[LayerInputs], object]) -> None:
        self._recorder, self._key, self._make = recorder, key, make

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor | None]:
        def call(*arguments: object, **options: object) -> torch.Tensor | None:
            return self._recorder.call(self._key, self._make, name, *arguments, **options)

        return call


class _RecordingInputs(LayerInputs):
    """What layers see while a pass is recorded: tokens, but no rows."""

    def __init__(self, batch: ForwardBatch, ops: OpTable, recorder: _Recorder) -> None:
        super().__init__(replace(batch, attention=_NoRows()), ops)
        self._recorder = recorder

    def mixer(self, key: Hashable, make: Callable[[LayerInputs], P]) -> P:
        """See `LayerInputs`."""
        return self.once(("mixer", key), lambda: cast("P", _Mixer(self._recorder, key, make)))


class _NoRows(Mapping[int | None, Any]):
    def __getitem__(self, window: int | None) -> Any:
        raise CannotDivideError("a layer looks at the rows of a step")

    def __iter__(self) -> Iterator[int | None]:
        raise CannotDivideError("a layer looks at the rows of a step")

    def __len__(self) -> int:
        raise CannotDivideError("a layer looks at the rows of a step")


class PiecewiseForward:
    """The forward passes of one rank over few enough tokens. Borrows everything."""

    def __init__(
        self,
        *,
        model: CausalLM,
        inputs: InputBuilder,
        table: RowTable,
        ops: OpTable,
        sizes: Sequence[int],
        pool: Any,
        device: torch.device,
    ) -> None:
        """sizes: numbers of tokens to record passes of, ascending. pool: memory of graphs, shared with others."""
        self._model = model
        self._inputs = inputs
        self._table = table
        self._ops = ops
        self._sizes = list(sizes)
        self._pool = pool
        self._device = device
        self._recordings: dict[int, _Recording] = {}
        self.capture_s = 0.0

    @property
    def num_captured(self) -> int:
        """Sizes recorded so far."""
        return len(self._recordings)

    def describe(self) -> str:
        """For the start-up log."""
        return (
            f"{len(self._sizes)} sizes of steps with prompts, in pieces, {self._sizes[0]} to {self._sizes[-1]} tokens"
        )

    def takes(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens are replayed. The pass for them is recorded now if it was not."""
        if not self._sizes or num_tokens > self._sizes[-1]:
            return False
        size = self._size_for(num_tokens)
        if size not in self._recordings:
            try:
                with capture_stream(self._device):
                    self._record(size)
            except CannotDivideError as exc:
                _log.warning("steps with prompts are not captured in pieces: %s", exc)
                self._sizes.clear()  # it is the model's layers, whatever the size
                return False
        return True

    def _size_for(self, num_tokens: int) -> int:
        return self._sizes[bisect.bisect_left(self._sizes, num_tokens)]

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """As `CausalLM.forward`, [T, D], for a step that `takes` allows; in memory that the next pass overwrites."""
        num_tokens = len(batch.token_ids)
        recording = self._recordings[self._size_for(num_tokens)]
        recording.place(batch)
        inputs = LayerInputs(batch, self._ops)
        for part in recording.parts:
            if isinstance(part, _Call):
                part.run(inputs, num_tokens)
            else:
                part.replay()
        return recording.hidden[:num_tokens]

    def record_all(self, agree: Callable[[bool], bool]) -> None:
        """Record sizes until the device needs longer for two in a row than the host to launch their kernels, or memory
        ends: larger ones would only lose, by what they are filled up with. Two, as one number of tokens may be slow.

        agree: whether all ranks say yes. Raises RuntimeError if there is no memory for any.
        """
        started_s = time.perf_counter()
        times: dict[int, _PassTimes] = {}
        with capture_stream(self._device):
            for size, before in zip(self._sizes, (None, *self._sizes)):
                if not agree(self._is_recorded(size)):
                    break
                times[size] = self._time(size)
                is_bound = not times[size].waits_for_launches
                if before is not None and agree(is_bound and not times[before].waits_for_launches):
                    del times[size]
                    break
        if not times:
            raise RuntimeError(f"no memory for steps of {self._sizes[0]} tokens in pieces")
        self._sizes = _without_slow_ones(times, agree)
        self._recordings = {size: self._recordings[size] for size in self._sizes}
        self.capture_s = time.perf_counter() - started_s

    def _is_recorded(self, size: int) -> bool:
        """Record a size, if there is memory for it."""
        try:
            self._record(size)
        except torch.OutOfMemoryError:
            _log.warning("steps of %d tokens and more are not captured in pieces: no memory is left", size)
            return False
        return True

    def _time(self, size: int) -> _PassTimes:
        """Of a pass over so many tokens, not all alike: those would have the same few experts."""
        padding = self._padding_batch(size)
        batch = replace(padding, token_ids=torch.arange(size, device=self._device) % self._model.vocab_size)
        begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        started_s = time.perf_counter()
        self._model.forward(batch)
        issue_ms = 1000 * (time.perf_counter() - started_s)
        torch.cuda.synchronize(self._device)
        device_ms = []
        for _ in range(_NUM_TIMINGS):
            begin.record()
            self.forward(batch)
            end.record()
            end.synchronize()
            device_ms.append(float(begin.elapsed_time(end)))
        return _PassTimes(issue_ms=issue_ms, device_ms=min(device_ms))

    def _padding_batch(self, size: int) -> ForwardBatch:
        """A prompt of so many tokens, of a row that stands for none."""
        states = self._table.states
        written = None if states is None else np.full((1, 1), states.spare_page)
        layout = lay_out([RowStep(self._table.padding_row, 0, size, samples=False)], written, self._device)
        return self._inputs.build(layout).batch

    def _record(self, size: int) -> None:
        """Record a pass over so many tokens, within `capture_stream`. Raises CannotDivideError."""
        padding = self._padding_batch(size)
        slots = {window: rows.slot.clone() for window, rows in padding.attention.items()}
        batch = replace(
            padding,
            token_ids=padding.token_ids.clone(),
            positions=padding.positions.clone(),
            attention={window: replace(rows, slot=slots[window]) for window, rows in padding.attention.items()},
        )
        actual = LayerInputs(batch, self._ops)
        # Makes plans, compiles kernels and creates handles, which a capture must not.
        self._model.forward(batch, actual)
        recorder = _Recorder(actual, self._pool)
        try:
            recorder.begin()
            hidden_TD = self._model.forward(batch, _RecordingInputs(batch, self._ops, recorder))
            recorder.end()
        except BaseException as exc:
            recorder.fail(type(exc), exc, exc.__traceback__)
            raise
        self._recordings[size] = _Recording(
            token_ids=batch.token_ids,
            positions=batch.positions,
            slots=slots,
            spare_slots={window: rows.slot for window, rows in padding.attention.items()},
            parts=recorder.parts,
            hidden=without_owning(hidden_TD),
        )
