"""What KV blocks of a device that does not exist contain: one 64-bit number per token in place of keys and values.

As in a real model, the number at a position follows from its token and from what the blocks contain for all positions
before it, and what is sampled follows from everything the row's blocks contain. So a block that was overwritten,
skipped or read from the wrong place changes the tokens of the request that uses it, and a test notices.

A row does not go through its blocks for every token: its `KvView` keeps a digest of what it has read, which starts anew
when somebody else changes one of its blocks. Knows nothing of steps, sampling and other engines.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

from atom_cluster.errors import ProtocolError

_EMPTY_CONTEXT = 0x9E3779B97F4A7C15
_NOISE = 0xD6E8FEB86659FD93
_MULTIPLIER = 0xFF51AFD7ED558CCD
_MASK = (1 << 64) - 1


def mix(digest: int, value: int) -> int:
    """A 64-bit digest of both; equal on every machine, and cheap."""
    digest = (digest ^ value) * _MULTIPLIER & _MASK
    return digest ^ (digest >> 32)


@dataclass(frozen=True, slots=True)
class Claim:
    """What is known of a block whose memory could not be looked at: the tag that its content must have, if any."""

    tag: int | None
    epoch: int


@dataclass(slots=True)
class BlockContent:
    """Numbers of a block's slots, as far as they were written; a claim stands for slots that are yet to be settled."""

    slots: list[int] = field(default_factory=list)
    claim: Claim | None = None


@dataclass(slots=True, eq=False)
class KvView:
    """One row's tokens and blocks, and digests of what the blocks contain for its first `num_read` positions."""

    token_ids: list[int]
    block_ids: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    """After each position."""

    @property
    def num_read(self) -> int:
        """Positions that were read or written."""
        return len(self.digests)

    @property
    def digest(self) -> int:
        """Of all of them."""
        return self.digests[-1] if self.digests else _EMPTY_CONTEXT

    def restart(self) -> None:
        """Forget what was read; blocks have changed."""
        self.digests.clear()

    def spoil(self, value: int) -> None:
        """Something else that the row reads is wrong: so will be what it computes."""
        self.digests[-1] = mix(self.digest ^ _NOISE, value)


class SimulatedMemory:
    """All blocks of one simulated device, and who looks at them. Written by its owner's thread only.

    Pages of cache groups behind the first are mere slots here; what they should contain is known to `sim_groups`.
    """

    def __init__(self, *, num_blocks: int, block_size: int, other_groups: Sequence[int] = ()) -> None:
        """`other_groups`: numbers of pages."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._groups = [[BlockContent() for _ in range(num_pages)] for num_pages in (num_blocks, *other_groups)]
        self._blocks = self._groups[0]
        self._views_by_block: dict[int, set[KvView]] = {}

    def attach(self, view: KvView, block_ids: Sequence[int]) -> None:
        """Append blocks to a view's. Raises ProtocolError for a block that does not exist or that it has already."""
        for block_id in block_ids:
            self.check_page(0, block_id)
            views = self._views_by_block.setdefault(block_id, set())
            if view in views:
                raise ProtocolError(f"block {block_id} is in a row's table already")
            views.add(view)
            view.block_ids.append(block_id)

    def detach(self, view: KvView) -> None:
        """The view is not used any more."""
        for block_id in view.block_ids:
            self._views_by_block[block_id].discard(view)

    def write(self, view: KvView, start: int, num_tokens: int) -> None:
        """Compute positions [start, start + num_tokens), given what the blocks contain before them."""
        self.read(view, start)
        digest, tokens, size = view.digest, view.token_ids, self.block_size
        position, end = start, start + num_tokens
        while position < end:
            index, offset = divmod(position, size)
            slots = []
            for at in range(position, min(end, (index + 1) * size)):
                slot = mix(digest, at << 32 | tokens[at])
                digest = mix(digest, slot)
                slots.append(slot)
                view.digests.append(digest)
            self._store(view, view.block_ids[index], offset, slots)
            position += len(slots)

    def read(self, view: KvView, num_tokens: int) -> None:
        """Bring the view's digest to `num_tokens` positions. Slots that nobody wrote count as zero."""
        del view.digests[num_tokens:]
        while view.num_read < num_tokens:
            index, offset = divmod(view.num_read, self.block_size)
            end = min(num_tokens - index * self.block_size, self.block_size)
            block = self._blocks[view.block_ids[index]]
            if block.claim is not None:
                self._settle(block, block.claim, view, end)
            slots = block.slots[offset:end]
            digest = view.digest
            for slot in slots + [0] * (end - offset - len(slots)):
                digest = mix(digest, slot)
                view.digests.append(digest)

    def _settle(self, block: BlockContent, claim: Claim, view: KvView, num_needed: int) -> None:
        """Fill a claimed block with what the view's tokens say, if that has the claimed tag, else with noise."""
        digest, slots = view.digest, []
        for at in range(view.num_read, min(len(view.token_ids), view.num_read + self.block_size)):
            slots.append(mix(digest, at << 32 | view.token_ids[at]))
            digest = mix(digest, slots[-1])
            if len(slots) >= num_needed and claim.tag in (None, _tag(slots, claim.epoch)):
                break
        else:
            slots = [_NOISE] * num_needed
        block.slots, block.claim = slots, None

    def _store(self, view: KvView, block_id: int, offset: int, slots: list[int]) -> None:
        block = self._blocks[block_id]
        if block.claim is not None:
            block.slots, block.claim = [], None
        old = block.slots[offset : offset + len(slots)]
        if old == slots and slots:
            return
        block.slots += [0] * (offset - len(block.slots))
        block.slots[offset:] = slots
        if old != slots[: len(old)]:
            self._disturb(block_id, view)

    def _disturb(self, block_id: int, writer: KvView | None = None) -> None:
        for view in self._views_by_block.get(block_id, ()):
            if view is not writer:
                view.restart()

    # --- pages of any group

    def has_page(self, group: int, page_id: int) -> bool:
        """Whether a page exists."""
        return group < len(self._groups) and 0 <= page_id < len(self._groups[group])

    def check_page(self, group: int, page_id: int) -> None:
        """Raise ProtocolError for a page that does not exist."""
        if not self.has_page(group, page_id):
            raise ProtocolError(f"there is no block {page_id} in group {group}")

    def content(self, block_id: int, group: int = 0) -> BlockContent:
        """A copy of what a block contains. Safe from any thread."""
        block = self._groups[group][block_id]
        return BlockContent(list(block.slots), block.claim)

    def fill(self, block_id: int, content: BlockContent, group: int = 0) -> None:
        """Put what was read from elsewhere into a block."""
        self._groups[group][block_id] = content
        if group == 0:
            self._disturb(block_id)

    def put(self, page_id: int, group: int, slot: int, value: int) -> None:
        """Write one slot of a page of a group behind the first."""
        slots = self._groups[group][page_id].slots
        slots += [0] * (slot + 1 - len(slots))
        slots[slot] = value

    def tag(self, block_id: int, epoch: int, group: int = 0) -> int:
        """Checksum of a block's content, keyed with the epoch."""
        return tag_of(self._groups[group][block_id], epoch)

    def corrupt(self, block_id: int) -> None:
        """Change everything in a block, as a fault of memory or network would."""
        slots = self._blocks[block_id].slots
        self.fill(block_id, BlockContent([mix(slot, _NOISE) for slot in slots] or [_NOISE]))


def tag_of(content: BlockContent, epoch: int) -> int:
    """64-bit checksum of a content, keyed with the epoch of the engine that it belongs to."""
    return _tag(content.slots, epoch)


def _tag(slots: Sequence[int], epoch: int) -> int:
    return int(xxhash.xxh64_intdigest(struct.pack(f"<{len(slots)}Q", *slots), seed=epoch))
