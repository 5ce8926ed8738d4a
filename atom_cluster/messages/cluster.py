"""Who is in the cluster, how loaded it is, and what its caches hold."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Role = Literal["prefill", "decode", "unified"]
MemberKind = Literal["ingress", "router", "engine"]


class PeerAddress(Struct, frozen=True, kw_only=True):
    """Where a process listens for cluster messages."""

    peer_id: str
    """Serve replica id, unique in the cluster."""
    endpoint: str
    """ZMQ endpoint, such as `tcp://10.0.0.3:40117`."""
    epoch: int
    """Random incarnation number; a restarted process has another one even on the same endpoint."""


class ErrorNote(Struct, frozen=True, kw_only=True):
    """Something that went wrong, for people to see."""

    at_s: float
    """Seconds since 1970, of the last time."""
    kind: str
    """Class name of the error."""
    message: str
    """Cut to 200 characters."""
    count: int = 1
    """How often it happened, one after another or between others."""


class EngineStatus(Struct, frozen=True, kw_only=True):
    """An engine at one moment, for people, tests and autoscaling; the router's decisions use `ReplicaLoad`."""

    num_running: int
    num_waiting: int
    num_tickets: int
    """Handoffs under way, on either side."""
    blocks_by_state: dict[str, int]
    """The ledger: each block in exactly one of free, cached, running, leased, arriving."""
    other_pages_by_state: dict[str, dict[str, int]] = {}
    """The same for the cache groups behind the first, by group: `window 128`, `state`."""
    num_mismatches: int = 0
    """Handoffs refused, since the engine started, because the other side's blocks do not mean the same. The router
    pairs equal engines only, so that there should be none."""
    recent_errors: tuple[ErrorNote, ...] = ()
    """The last few, oldest first: failed requests and handoffs, not what clients did wrong."""


class StatusRequest(Struct, frozen=True, tag="status_request"):
    """Somebody watches an engine more closely than its announcements allow."""


class StatusAnswer(Struct, frozen=True, kw_only=True, tag="status"):
    """Answer to `StatusRequest`, from the thread that serves the socket, whatever the engine is doing."""

    epoch: int
    status: EngineStatus


class MemberCard(Struct, frozen=True, kw_only=True):
    """What a member announces about itself, every `serving.announce_period_s`."""

    address: PeerAddress
    kind: MemberKind
    role: Role | None = None
    """Engines only."""
    model: str = ""
    fingerprint: str = ""
    """Engines only; the router pairs prefill and decode with equal fingerprints. Their block sizes may differ."""
    num_blocks: int = 0
    block_size: int = 0
    is_draining: bool = False
    node: str = ""
    pid: int = 0
    actor: str = ""
    """Ingresses only: what Ray calls its actor, so that the router can end one that stands still."""
    choices: dict[str, str] = {}
    """What was chosen automatically and why (op backend, transport, dtype ...), shown at /v1/cluster."""
    status: EngineStatus | None = None
    """Engines only, as of the announcement."""


class Membership(Struct, frozen=True, kw_only=True):
    """Everybody the router has heard from within `serving.member_timeout_s`; the answer to an announcement."""

    router: PeerAddress
    members: tuple[MemberCard, ...]


class EngineSpeed(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How fast an engine was lately, as it measured itself. Tables are ascending (size, seconds), at most 64 long, and
    empty where nothing was measured."""

    prompt_s: tuple[tuple[int, float], ...] = ()
    """Prompt tokens of a step, and the seconds that they add to it."""
    decode_step_s: float = 0.0
    """Of a step in which rows decode, and nothing else; 0 if there was none."""
    handoff_s: tuple[tuple[int, float], ...] = ()
    """Prompt tokens whose KV was read from prefill engines, and the seconds from ordering a prompt to having it, beyond
    those that the other engine took until it had the first token: messages, checksums, reading that nothing hid."""
    chunk_tokens: int = 0
    """Most prompt tokens that it computes in a step, at the moment."""


class ReplicaLoad(Struct, frozen=True, kw_only=True, tag="load"):
    """An engine's load, sent to the router when it changed, at most every `routing.load_period_s`."""

    peer_id: str
    epoch: int
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    """Prompt tokens not computed yet, of waiting requests, of running ones, and in steps under way."""
    num_free_blocks: int
    """Free or cached, i.e. available to new requests."""
    num_blocks: int
    speed: EngineSpeed = EngineSpeed()


class CacheEvents(Struct, frozen=True, kw_only=True, tag="cache_events"):
    """Blocks that entered and left an engine's prefix cache, in order, as 64-bit chained block hashes.

    `first_seq` counts events since the engine started: `stored` then `removed` are each one event per hash. A receiver
    that expected another number has lost something and asks for a snapshot.
    """

    peer_id: str
    epoch: int
    first_seq: int
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    """A hash in both was stored and then removed within the batch."""


class CacheSnapshot(Struct, frozen=True, kw_only=True, tag="cache_snapshot"):
    """All block hashes an engine has cached; the next event will have number `next_seq`."""

    peer_id: str
    epoch: int
    next_seq: int
    hashes: tuple[int, ...]


class SnapshotRequest(Struct, frozen=True, tag="snapshot_request"):
    """The router lost track of an engine's cache, or is new."""

    epoch: int


class RouteQuery(Struct, frozen=True, kw_only=True, tag="route_query"):
    """An ingress asks where to send a request."""

    query_id: int
    block_hashes: tuple[tuple[int, ...], ...]
    """Chained hashes of the prompt's full blocks: once for each kind of engine, since their seed is the fingerprint and
    blocks may differ in size. An engine has hashes of its own kind only."""
    num_tokens: int
    expected_output_tokens: int
    excluded: tuple[str, ...] = ()
    """Engines that just failed this request."""
    client_request_id: str = ""
    """The id under which its client knows the request; for logs only."""


class RouteDecision(Struct, frozen=True, kw_only=True, tag="route_decision"):
    """Where a request goes, and why."""

    query_id: int
    decode: PeerAddress | None
    """The engine the ingress sends the request to; None when there is none (then `reason` says why)."""
    prefill: PeerAddress | None = None
    reason: str = ""
    """One of `routing.policy.REASONS`: the label of the decisions metric."""
    decode_cached_blocks: int = 0
    prefill_cached_blocks: int = 0


class RequestDone(Struct, frozen=True, tag="request_done"):
    """An ingress tells the router that a request it placed has ended, so that load estimates stay right."""

    query_id: int
