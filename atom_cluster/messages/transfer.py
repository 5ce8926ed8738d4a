"""KV blocks on the move: control messages between two engines, commands and reports between an engine and its ranks.

Life of a ticket (decode asks, prefill publishes, decode reads, decode releases):

    decode                                   prefill
      PrefillOrder ───────────────────────────>   schedules the prompt
      <───────────────────────── PrefillAccepted  epoch, how to reach its KV memory
      <───────────────────────── KvPublication    a chunk's full blocks, tagged, leased to the ticket
        reads them, checks tags                   (computes the next chunk meanwhile)
      <───────────────────────── KvPublication    last one: remaining blocks and the first token
      TicketRenew (every lease/3) ────────────>
      TicketRelease ──────────────────────────>   blocks return to the pool; at any phase, it also cancels

Either side may end it: prefill with `PrefillFailed`, decode with `TicketRelease`. A ticket that is neither renewed nor
released expires on prefill's own monotonic clock after `lease_s`.
"""

from __future__ import annotations

from msgspec import Struct

from atom_cluster.messages.grammars import GrammarReady
from atom_cluster.messages.profile import WindowWritten
from atom_cluster.messages.requests import SamplingParams, TokenDelta
from atom_cluster.messages.timing import EngineSpan


class KvPlacement(Struct, frozen=True, array_like=True):
    """How an engine lays out its KV: what may differ between two engines that read from each other.

    With the model's layout, which is part of the fingerprint, it says where on which rank each byte is
    (`kv_cache.page_map`).
    """

    block_size: int
    """Tokens per block. Of two engines', one is a multiple of the other."""
    world_size: int
    """Ranks, over which KV heads are divided."""


class KvOffer(Struct, frozen=True, array_like=True):
    """One way to reach an engine's KV memory: opaque descriptors, one per rank, understood by that transport only."""

    transport: str
    descriptors: tuple[bytes, ...]


class KvExport(Struct, frozen=True, kw_only=True):
    """How another engine can read this engine's KV blocks."""

    epoch: int
    """Incarnation of the exporting engine; block ids mean nothing under another epoch."""
    fingerprint: str
    """Digest of model, weights, KV layout and dtype, drafting and code; must be equal on both sides."""
    fingerprint_fields: dict[str, str]
    """What went into the digest, so that a refusal can say what differs."""
    placement: KvPlacement
    """May differ."""
    offers: tuple[KvOffer, ...]
    """In order of preference."""


class PrefillOrder(Struct, frozen=True, kw_only=True, tag="prefill_order"):
    """Decode asks prefill to compute a prompt under a ticket."""

    ticket_id: str
    """Unique: `<decode epoch>/<request id>/<attempt>`."""
    request_id: str
    client_request_id: str = ""
    """As in `EngineRequest`."""
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    emitted: tuple[int, ...] = ()
    """As in `EngineRequest`. Blocks, publications and the first token are of the prompt with these behind it."""
    num_tokens_held: int
    """Leading tokens whose KV decode already has; blocks that only these have part of need not be published."""
    lease_s: float
    fingerprint: str
    fingerprint_fields: dict[str, str]
    placement: KvPlacement
    """Of decode: what its ranks will read decides what the tags cover."""
    wants_tags: bool = True
    """Whether decode checks what it reads. Without it nobody computes a checksum."""
    priority: int = 0


class PrefillAccepted(Struct, frozen=True, kw_only=True, tag="prefill_accepted"):
    """Prefill will run the order. Always precedes the first publication."""

    ticket_id: str
    export: KvExport


class KvPublication(Struct, frozen=True, kw_only=True, tag="kv_publication"):
    """Blocks of one ticket that are complete and may be read now."""

    ticket_id: str
    epoch: int
    first_block: int
    """Index, within the prompt's blocks of the exporting engine's size, of `block_ids[0]`. Publications of the first
    cache group are contiguous and in order. Of other groups only what the tokens behind the prompt need is published:
    the end of a window, the state (whose index is 0)."""
    block_ids: tuple[int, ...]
    """Page ids in the exporting engine's memory of the group."""
    tags: tuple[tuple[int, ...], ...]
    """tags[r]: 64-bit checksums, keyed with the epoch, of what rank r of decode reads: from each rank that it reads
    from, in order, one for each unit, in order. A unit is as many tokens as the smaller of both engines' blocks has.
    Between engines of equal placement, tags[r][i] is thus of rank r's part of block i. Empty when decode wants none."""
    group: int = 0
    """Cache group of the pages (`kv_cache.layout`)."""
    first_token: TokenDelta | None = None
    """In the last publication only: the token sampled from the prompt, its logprobs, the count of cached tokens."""
    drafts: tuple[int, ...] = ()
    """In the last publication only: tokens drafted behind the first one."""
    spans: tuple[EngineSpan, ...] = ()
    """In the last publication only: prefill's time from the order's arrival to this publication."""


class PrefillFailed(Struct, frozen=True, kw_only=True, tag="prefill_failed"):
    """The ticket is over on prefill's side and its blocks are released. Decode may compute the prompt itself."""

    ticket_id: str
    kind: str
    """Class name of `atom_cluster.errors`."""
    message: str


class TicketRenew(Struct, frozen=True, tag="ticket_renew"):
    """Decode is alive and still wants these tickets."""

    ticket_ids: tuple[str, ...]


class TicketRelease(Struct, frozen=True, tag="ticket_release"):
    """Decode has read, or no longer wants, these tickets' blocks; work still running for them is cancelled."""

    ticket_ids: tuple[str, ...]


# --- engine -> ranks, inside a StepPlan ---------------------------------------------------------------------------


class ConnectPeer(Struct, frozen=True, kw_only=True, tag="connect"):
    """Prepare to read from another engine. Idempotent. Each rank connects to those that have what it lacks."""

    peer: str
    """Name for later reads: `<replica id>/<epoch>`."""
    transport: str
    descriptors: tuple[bytes, ...]
    """By rank of the peer."""
    others: tuple[KvOffer, ...] = ()
    """More transports that both sides have, best first, for ranks that the first one does not connect."""
    placement: KvPlacement
    """Of the peer."""


class TagBlocks(Struct, frozen=True, kw_only=True, tag="tag"):
    """Compute the checksums of blocks whose KV is in place: the result of the step that wrote it was collected."""

    ticket_id: str
    epoch: int
    first_block: int
    block_ids: tuple[int, ...]
    reader: KvPlacement
    """Of the engine that will read them."""
    group: int = 0


class ReadBlocks(Struct, frozen=True, kw_only=True, tag="read"):
    """Copy the tokens that a peer's blocks and local ones have in common, and check their tags.

    Ends, in bounded time, with a `ReadFinished`.
    """

    read_id: int
    peer: str
    epoch: int
    remote_block_ids: tuple[int, ...]
    local_block_ids: tuple[int, ...]
    """As many as remote ones if blocks of both sides are equally large."""
    tags: tuple[tuple[int, ...], ...]
    """As in `KvPublication`; rank r checks `tags[r]`. Empty when checking is turned off."""
    timeout_s: float
    first_remote_block: int = 0
    """Index, within the prompt's blocks of the peer's size, of the first remote one."""
    first_local_block: int = 0
    """The same of the first local one, in blocks of the own size."""
    group: int = 0


class DropPeer(Struct, frozen=True, kw_only=True, tag="drop"):
    """Forget a peer; reads from it that are under way finish with an error."""

    peer: str


KvCommand = ConnectPeer | TagBlocks | ReadBlocks | DropPeer


# --- ranks -> engine ----------------------------------------------------------------------------------------------


class BlocksTagged(Struct, frozen=True, kw_only=True, tag="tagged"):
    """Answer to `TagBlocks`, combined over ranks: tags as in `KvPublication`."""

    ticket_id: str
    first_block: int
    tags: tuple[tuple[int, ...], ...]
    group: int = 0


class ReadFinished(Struct, frozen=True, kw_only=True, tag="read_finished"):
    """Answer to `ReadBlocks`, combined over ranks. No rank touches the local blocks after this."""

    read_id: int
    bad_blocks: tuple[int, ...] = ()
    """Indices into the command's local blocks: those with something whose checksum did not match on some rank."""
    error: str | None = None
    """Set when the read failed as a whole (peer gone, timeout); no block of it may be used."""
    num_bytes: int = 0
    seconds: float = 0.0
    transport: str = "none"
    """What rank 0 reads through; `none` if it is not connected to the peer."""


KvReport = BlocksTagged | ReadFinished
Report = KvReport | WindowWritten | GrammarReady


class RankReport(Struct, frozen=True, kw_only=True):
    """One rank's own answer to a command, on its way to rank 0, which combines those of all ranks.

    A `BlocksTagged` in it has tags of what is read from this rank only.
    """

    rank: int
    report: Report
