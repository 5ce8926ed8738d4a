"""Conditional disaggregation: is a prompt computed sooner by prefill, or where it is decoded? Pure; no state.

Both are expected times until the request decodes, in seconds, from what the engines measured and from the router's view
of their queues. With `t(n)` the time that n prompt tokens take, in steps of at most `chunk_tokens`, beside whatever
decodes there:

    remote = t_prefill(waiting there + missing there) + handoff(missing here)
    local  = t_decode(waiting here + missing here) + DISTURBANCE * max(1, rows here) * added_decode(missing here)

`missing` are prompt tokens that the engine has not cached; prefill needs all of them, also those that decode has.
`handoff` is the time that handoffs took beyond the computing: messages, checksums, reading that nothing hid. Rows
that decode wait while prompts are computed beside them, each of them for what is added to their steps.

What an engine has not measured (at first, or of sizes that it was not given for long) is taken from the other one, at
this engine's own level where both have measured the same. While neither knows anything, prompts go to prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.messages.cluster import EngineSpeed
from atom_cluster.observability.estimates import Points, seconds_of

DISTURBANCE = 0.2
"""A second by which a row's next token is late, in seconds of waiting for a first token. A stall of a stream that has
begun is a small part of its time; the wait for its first token is all that its reader sees. At least one row counts: a
decode replica that is idle now may not be so when a long prompt is half computed."""
MAX_LEVEL = 8.0
"""Where an engine's speed has not been measured, it is not believed to be further than this from the other's."""

PLACES = (
    "remote",
    "short",
    "decode_sooner",
    "prefill_busy",
    "prefill_away",
    "decode_away",
    "unified",
)
"""Where a prompt is computed, and why: the label of the places metric.

remote: by the prefill replica of the pair.
short: where it decodes; hardly any of it is missing there.
decode_sooner: where it decodes, which is sooner even if prefill had nothing else to do.
prefill_busy: where it decodes, which is sooner because of what prefill has to do.
prefill_away: where it decodes, as there is no prefill replica whose blocks mean the same.
decode_away: by a prefill replica, which decodes it, too, as no decode replica can.
unified: by a replica that does both.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """An engine that might compute the prompt."""

    speed: EngineSpeed
    num_waiting_tokens: int
    """Prompt tokens that it computes before."""
    num_missing_tokens: int
    """Of this prompt."""
    num_decoding: int
    """Requests that decode there, or will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Seconds that either way is expected to cost; zeros while nothing is known."""

    place: str
    """`remote`, `decode_sooner` or `prefill_busy`."""
    local_s: float = 0.0
    remote_s: float = 0.0


def compare(decode: Side, prefill: Side) -> Comparison:
    """The sooner of both. Remote if they are equal, or unknown."""
    if not (decode.speed.prompt_s or prefill.speed.prompt_s):
        return Comparison(place="remote")
    local_s = _local_seconds(decode, prefill)
    handoff_s = _handoff_seconds(decode)
    remote_s = _prompt_seconds(prefill, decode, prefill.num_waiting_tokens) + handoff_s
    if local_s >= remote_s:
        return Comparison(place="remote", local_s=local_s, remote_s=remote_s)
    idle_s = _prompt_seconds(prefill, decode, 0) + handoff_s
    place = "decode_sooner" if local_s < idle_s else "prefill_busy"
    return Comparison(place=place, local_s=local_s, remote_s=remote_s)


def _local_seconds(decode: Side, prefill: Side) -> float:
    added_s = _added_seconds(decode, prefill, decode.num_missing_tokens)
    disturbance_s = DISTURBANCE * max(1, decode.num_decoding) * added_s
    return _prompt_seconds(decode, prefill, decode.num_waiting_tokens) + disturbance_s


def _prompt_seconds(side: Side, other: Side, num_waiting_tokens: int) -> float:
    """Until the prompt is computed, with what is before it."""
    num_tokens = num_waiting_tokens + side.num_missing_tokens
    seconds = _added_seconds(side, other, num_tokens)
    if side.num_decoding:
        seconds += _num_steps(side, num_tokens) * side.speed.decode_step_s
    return seconds


def _added_seconds(side: Side, other: Side, num_tokens: int) -> float:
    """What so many prompt tokens add to the steps that they are computed in."""
    if side.speed.chunk_tokens <= 0:
        return _chunk_seconds(side.speed.prompt_s, other.speed.prompt_s, num_tokens)
    num_full, num_rest = divmod(num_tokens, side.speed.chunk_tokens)
    full_s = _chunk_seconds(side.speed.prompt_s, other.speed.prompt_s, side.speed.chunk_tokens) if num_full else 0.0
    rest_s = _chunk_seconds(side.speed.prompt_s, other.speed.prompt_s, num_rest) if num_rest else 0.0
    return num_full * full_s + rest_s


def _num_steps(side: Side, num_tokens: int) -> int:
    return -(-num_tokens // side.speed.chunk_tokens) if side.speed.chunk_tokens > 0 else 1


def _chunk_seconds(own: Points, other: Points, num_tokens: int) -> float:
    """One step's prompt tokens. Beyond what the engine has measured itself, the other's table at the own level."""
    if not own:
        return seconds_of(other, num_tokens)
    if not other or _is_covered(own, num_tokens):
        return seconds_of(own, num_tokens)
    nearest, own_s = own[0] if num_tokens < own[0][0] else own[-1]
    other_s = seconds_of(other, nearest)
    is_comparable = other_s > 0 and _is_covered(other, nearest)
    level = min(MAX_LEVEL, max(1 / MAX_LEVEL, own_s / other_s)) if is_comparable else 1.0
    return level * seconds_of(other, num_tokens)


def _is_covered(points: Points, num_tokens: int) -> bool:
    """Whether something of that size was measured."""
    return points[0][0] / 2 <= num_tokens <= points[-1][0] * 2


def _handoff_seconds(decode: Side) -> float:
    points = decode.speed.handoff_s
    # Little takes as long as the least that was measured: messages have no size.
    return seconds_of(points, max(decode.num_missing_tokens, points[0][0])) if points else 0.0
