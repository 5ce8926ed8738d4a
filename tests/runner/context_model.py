"""A CausalLM without weights whose next token is a known function of all tokens before it, read through its caches.

So any mistake in tokens, positions, slots, page tables, states, row starts or sample indices shows as a wrong token.
Its drafts are right except where `is_drafted_wrong` says otherwise: so any mistake in what drafting layers are given,
or left behind in their caches, shows as a draft that should have been kept and was not, or the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atom_cluster.config.observability import ProfileConfig
from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout, StateLayerLayout, StateTensor
from atom_cluster.kv_transfer.agent import KvAgent
from atom_cluster.layers.forward_batch import ForwardBatch, KvLayerCache, StateLayerCache
from atom_cluster.layers.logits import Logits
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner.kv_memory import KvMemory, allocate_kv_memory
from atom_cluster.runner.kv_sizing import other_groups
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.structured.compiler import GrammarCompiler

VOCAB = 97
BLOCK = 4
MAX_MODEL_LEN = 40
GREEDY = SamplingParams(temperature=0.0, seed=0)
WRONG_EVERY = 5
"""The token at every so many positions is drafted wrong by a model that drafts wrong at all."""


def fold(state: int, token: int) -> int:
    """What a token makes of the state."""
    return (state * 31 + token + 1) % 9973


def next_token(tokens: Sequence[int], *, window: int | None = None, has_state: bool = False) -> int:
    """The token that `ContextModel` with these parts finds most likely after these."""
    total = sum((position + 1) * token for position, token in enumerate(tokens))
    if window is not None:
        total += 7 * sum(tokens[-window:])
    if has_state:
        state = 0
        for token in tokens:
            state = fold(state, token)
        total += state
    return total % VOCAB


def continuation(
    prompt: Sequence[int], num_tokens: int, *, window: int | None = None, has_state: bool = False
) -> list[int]:
    """Greedy output for a prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, window=window, has_state=has_state))
    return tokens[len(prompt) :]


def is_drafted_wrong(position: int) -> bool:
    """Whether a model that drafts wrong at all drafts a wrong token for this position."""
    return position % WRONG_EVERY == 2


class ContextModel:
    """See the module's docstring.

    Hidden states: the position, the sum over all tokens, the tokens of the window, the state, and the sums over the
    first tokens of the row, which drafting layers do not see in their own caches.
    """

    vocab_size = VOCAB

    def __init__(
        self,
        *,
        window: int | None = None,
        has_state: bool = False,
        num_draft_layers: int = 0,
        drafts_wrong: bool = False,
        fail_on: int | None = None,
        num_positions: int = MAX_MODEL_LEN,
    ) -> None:
        """fail_on: a step raises that has this token among its input. num_positions: how long tables of them are."""
        full = KvLayerLayout(num_kv_heads=1, key_dim=1, value_dim=1, dtype="float32")
        layers: list[KvLayerLayout | StateLayerLayout] = [full, full]
        if window is not None:
            layers.append(KvLayerLayout(num_kv_heads=1, key_dim=3, value_dim=0, dtype="float32", window=window))
        if has_state:
            tensor = StateTensor(name="fold", shape=(2,), dtype="float32")
            layers.insert(1, StateLayerLayout(tensors=(tensor,)))
        layers += [full] * num_draft_layers
        self.kv_layout = KvLayout(layers=tuple(layers))
        self.num_draft_layers = num_draft_layers
        self._window = window
        self._has_state = has_state
        self._drafts_wrong = drafts_wrong
        self._fail_on = fail_on
        self._num_positions = num_positions

    # --- the model

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        if self._fail_on in batch.token_ids.tolist():
            raise RuntimeError("the device caught fire")
        check_batch(batch, self._num_positions)
        for index, layer in enumerate(self.kv_layout.layers[: len(batch.caches) - self.num_draft_layers]):
            cache = batch.caches[index]
            if isinstance(layer, KvLayerLayout):
                store(cache, batch, layer.window, batch.token_ids, batch.positions + 1)
        folds = self._fold_states(batch)
        return torch.stack([self._hidden(batch, t, folds) for t in range(len(batch.token_ids))])

    def compute_logits(self, hidden_SD: torch.Tensor) -> Logits:  # noqa: N803 - the protocol's name
        return one_hot(self._best(hidden_SD))

    def _hidden(self, batch: ForwardBatch, t: int, folds: list[int]) -> torch.Tensor:
        position = int(batch.positions[t])
        total = self._sum(batch, 1 + self._has_state, t)
        seen: list[float] = []
        if self._window is not None:
            keys = gather(batch, self._cache_of_window(batch), t, self._window)[0][:, 0].tolist()
            seen = [0.0] * (self._window - len(keys)) + keys
        heads = [self._sum(batch, 0, t, num_tokens=i + 1) for i in range(self.num_draft_layers)]
        return torch.tensor([position, total, folds[t], *heads, *seen], dtype=torch.float64)

    def _best(self, hidden: torch.Tensor) -> torch.Tensor:
        best = hidden[:, 1].long()
        if self._window is not None:
            best = best + 7 * hidden[:, -self._window :].sum(dim=1).long()
        return (best + hidden[:, 2].long() * self._has_state) % VOCAB

    def _sum(self, batch: ForwardBatch, index: int, t: int, *, num_tokens: int | None = None) -> float:
        key, value = gather(batch, batch.caches[index], t, None)
        return float((key[:num_tokens, 0].double() * value[:num_tokens, 0].double()).sum())

    def _cache_of_window(self, batch: ForwardBatch) -> KvLayerCache:
        cache = batch.caches[2 + self._has_state]
        assert isinstance(cache, KvLayerCache)
        return cache

    def _fold_states(self, batch: ForwardBatch) -> list[int]:
        """The state after each token; leaves in memory what the step's metadata says."""
        if batch.state is None:
            return [0] * len(batch.token_ids)
        cache = batch.caches[1]
        assert isinstance(cache, StateLayerCache)
        memory = cache.tensors["fold"]
        starts = batch.attention[None].query_start_cpu
        folds = []
        for row, read in enumerate(batch.state.read_page.tolist()):
            state, count = (0, 0) if read < 0 else (int(x) for x in memory[read])
            pages = batch.state.write_page[row].tolist()
            for j, t in enumerate(range(starts[row], starts[row + 1])):
                assert count == int(batch.positions[t]), "the state is of another position"
                state, count = fold(state, int(batch.token_ids[t])), count + 1
                folds.append(state)
                if batch.state.keeps_all_cpu[row]:
                    memory[pages[j]] = torch.tensor([state, count])
            if not batch.state.keeps_all_cpu[row]:
                memory[pages[0]] = torch.tensor([state, count])
        return folds

    # --- its drafting layers

    def forward_draft(
        self,
        index: int,
        next_token_ids_T: torch.Tensor,  # noqa: N803 - the protocol's names
        hidden_TD: torch.Tensor,  # noqa: N803
        batch: ForwardBatch,
    ) -> torch.Tensor:
        check_batch(batch, self._num_positions)
        own = len(batch.caches) - self.num_draft_layers + index
        store(batch.caches[own], batch, None, next_token_ids_T, batch.positions + 2 + index)
        rows = []
        for t, token in enumerate(next_token_ids_T.tolist()):
            hidden = hidden_TD[t].clone()
            hidden[0] += 1
            position = int(hidden[0])
            hidden[3 + position : 3 + self.num_draft_layers] += (position + 1) * token
            hidden[1] = hidden[3 + index] + self._sum(batch, own, t)
            hidden[2] = fold(int(hidden[2]), token)
            if self._window is not None:
                hidden[-self._window :] = torch.cat([hidden[-self._window + 1 :], torch.tensor([float(token)])])
            rows.append(hidden)
        return torch.stack(rows)

    def compute_draft_logits(self, index: int, hidden_SD: torch.Tensor) -> Logits:  # noqa: N803
        best = self._best(hidden_SD)
        if self._drafts_wrong:
            is_wrong = torch.tensor([is_drafted_wrong(int(position) + 1) for position in hidden_SD[:, 0]])
            best = (best + is_wrong.long()) % VOCAB
        return one_hot(best)


def one_hot(best: torch.Tensor) -> Logits:
    return Logits(torch.nn.functional.one_hot(best, VOCAB).float() * 5, VOCAB, ProcessGroups.single().tensor)


def check_batch(batch: ForwardBatch, num_positions: int) -> None:
    assert int(batch.positions.max()) < num_positions, "tables of positions end here"
    for metadata in batch.attention.values():
        starts = metadata.query_start.tolist()
        assert tuple(starts) == metadata.query_start_cpu
        assert tuple(metadata.context_len.tolist()) == metadata.context_len_cpu
        assert all(n == 1 for n in torch.tensor(starts).diff()[: metadata.num_decode_rows])


def store(cache: object, batch: ForwardBatch, window: int | None, keys: torch.Tensor, values: torch.Tensor) -> None:
    assert isinstance(cache, KvLayerCache)
    slot = batch.attention[window].slot
    cache.key[slot // BLOCK, slot % BLOCK] = keys.float()[:, None, None]
    cache.value[slot // BLOCK, slot % BLOCK] = values.float()[:, None, None]


def gather(batch: ForwardBatch, cache: object, t: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that a token sees, [positions, heads * dim]."""
    assert isinstance(cache, KvLayerCache)
    metadata = batch.attention[window]
    row = next(r for r in range(len(metadata.context_len_cpu)) if metadata.query_start_cpu[r + 1] > t)
    end = int(batch.positions[t]) + 1
    positions = torch.arange(0 if window is None else max(0, end - window), end)
    pages = metadata.block_table[row, positions // BLOCK].long()
    found = [tensor[pages, positions % BLOCK].flatten(1) for tensor in (cache.key, cache.value)]
    return found[0], found[1]


def make_memory(model: ContextModel | None = None, num_pages: tuple[int, ...] = (32,)) -> KvMemory:
    layout = (model or ContextModel()).kv_layout
    return allocate_kv_memory(layout, num_pages=num_pages, block_size=BLOCK, device=torch.device("cpu"))


def make_runner(
    *,
    model: ContextModel | None = None,
    num_rows: int = 4,
    memory: KvMemory | None = None,
    agent: KvAgent | None = None,
    max_drafts: int = 0,
    profile: ProfileConfig | None = None,
    grammars: GrammarCompiler | None = None,
    graph_sizes: Sequence[int] = (),
) -> ModelRunner:
    model = model or ContextModel()
    memory = memory or make_memory(model)
    num_pages = tuple(len(region.blocks) for region in memory.regions)
    info = RankInfo(
        num_blocks=num_pages[0],
        other_groups=other_groups(model.kv_layout, num_pages),
        max_drafts=max_drafts,
        block_size=BLOCK,
        max_num_requests=num_rows,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB,
        kv_descriptors=dict(agent.descriptors) if agent else {},
    )
    return ModelRunner(
        model=model,
        groups=ProcessGroups.single(),
        memory=memory,
        ops=torch_table("test"),
        info=info,
        device=torch.device("cpu"),
        agent=agent,
        profile=profile,
        grammars=grammars,
        graph_sizes=graph_sizes,
    )
