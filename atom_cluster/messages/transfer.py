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

from atom_cluster.messages.profile import WindowWritten
from atom_cluster.messages.requests import SamplingParams, TokenDelta


class KvOffer(Struct, frozen=True, array_like=True):
    """One way to reach an engine's KV memory: opaque descriptors, one per rank, understood by that transport only."""

    transport: str
    descriptors: tuple[bytes, ...]


class KvExport(Struct, frozen=True, kw_only=True):
    """How another engine can read this engine's KV blocks."""

    epoch: int
    """Incarnation of the exporting engine; block ids mean nothing under another epoch."""
    fingerprint: str
    """Digest of model, revision, KV layout, dtype, block size and parallel layout; must be equal on both sides."""
    fingerprint_fields: dict[str, str]
    """What went into the digest, so that a refusal can say what differs."""
    offers: tuple[KvOffer, ...]
    """In order of preference."""


class PrefillOrder(Struct, frozen=True, kw_only=True, tag="prefill_order"):
    """Decode asks prefill to compute a prompt under a ticket."""

    ticket_id: str
    """Unique: `<decode epoch>/<request id>/<attempt>`."""
    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    num_blocks_held: int
    """Leading full blocks that decode already has and does not need to be published."""
    lease_s: float
    fingerprint: str
    fingerprint_fields: dict[str, str]
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
    """Index, within the prompt's blocks, of `block_ids[0]`. Publications of the first cache group are contiguous and in
    order. Of other groups only what the tokens behind the prompt need is published: the end of a window, the state
    (whose index is 0)."""
    block_ids: tuple[int, ...]
    """Page ids in the exporting engine's memory of the group."""
    tags: tuple[tuple[int, ...], ...]
    """tags[rank][i]: 64-bit content checksum of the rank's part of block i, keyed with the epoch."""
    group: int = 0
    """Cache group of the pages (`kv_cache.layout`)."""
    first_token: TokenDelta | None = None
    """In the last publication only: the token sampled from the prompt, its logprobs, the count of cached tokens."""
    drafts: tuple[int, ...] = ()
    """In the last publication only: tokens drafted behind the first one."""


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
    """Prepare to read from another engine. Idempotent. Rank r uses `descriptors[r]`."""

    peer: str
    """Name for later reads: `<replica id>/<epoch>`."""
    transport: str
    descriptors: tuple[bytes, ...]


class TagBlocks(Struct, frozen=True, kw_only=True, tag="tag"):
    """Compute the checksums of blocks whose KV the forward passes up to this plan have written."""

    ticket_id: str
    epoch: int
    first_block: int
    block_ids: tuple[int, ...]
    group: int = 0


class ReadBlocks(Struct, frozen=True, kw_only=True, tag="read"):
    """Copy a peer's blocks into local ones and check their tags. Ends, in bounded time, with a `ReadFinished`."""

    read_id: int
    peer: str
    epoch: int
    remote_block_ids: tuple[int, ...]
    local_block_ids: tuple[int, ...]
    tags: tuple[tuple[int, ...], ...]
    """As in `KvPublication`; rank r checks `tags[r]`. Empty when checking is turned off."""
    timeout_s: float
    group: int = 0


class DropPeer(Struct, frozen=True, kw_only=True, tag="drop"):
    """Forget a peer; reads from it that are under way finish with an error."""

    peer: str


KvCommand = ConnectPeer | TagBlocks | ReadBlocks | DropPeer


# --- ranks -> engine ----------------------------------------------------------------------------------------------


class BlocksTagged(Struct, frozen=True, kw_only=True, tag="tagged"):
    """Answer to `TagBlocks`, combined over ranks: tags[rank][i] belongs to block_ids[i] of the command."""

    ticket_id: str
    first_block: int
    tags: tuple[tuple[int, ...], ...]
    group: int = 0


class ReadFinished(Struct, frozen=True, kw_only=True, tag="read_finished"):
    """Answer to `ReadBlocks`, combined over ranks. No rank touches the local blocks after this."""

    read_id: int
    bad_blocks: tuple[int, ...] = ()
    """Indices into the command's block lists whose checksum did not match on some rank."""
    error: str | None = None
    """Set when the read failed as a whole (peer gone, timeout); no block of it may be used."""
    num_bytes: int = 0
    seconds: float = 0.0


KvReport = BlocksTagged | ReadFinished
Report = KvReport | WindowWritten


class RankReport(Struct, frozen=True, kw_only=True):
    """One rank's own answer to a command, on its way to rank 0, which combines those of all ranks.

    A `BlocksTagged` in it has one entry in `tags`: the rank's.
    """

    rank: int
    report: Report
