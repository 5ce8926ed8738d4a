"""Linear attention with drafts: whatever number of them is kept, later tokens see the state of the last kept one."""

from dataclasses import dataclass

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout
from atom_cluster.layers.forward_batch import AttentionMetadata, ForwardBatch, LayerInputs, StateMetadata
from atom_cluster.layers.gated_delta_net import GatedDeltaNet, GatedDeltaSpec
from atom_cluster.ops.select import select_ops, torch_table
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import Group, ProcessGroups
from atom_cluster.platform.detect import detect_platform
from atom_cluster.weights.dummy import fill_weights
from atom_cluster.weights.rules import CheckpointMap
from tests.models.paged_driver import make_caches, make_context

SPEC = GatedDeltaSpec(
    hidden_size=20,
    num_key_heads=2,
    num_value_heads=6,
    key_dim=8,
    value_dim=5,
    conv_size=4,
    norm_eps=1e-6,
    is_grouped=True,
)
SOME_KV = KvLayerLayout(num_kv_heads=1, key_dim=4, value_dim=4, dtype="float32")
WIDTH = 3
"""Pages that a row may write to in a step: its newest token and two drafts."""


@dataclass(frozen=True)
class Row:
    """What a row does in a step."""

    x: torch.Tensor
    read: int
    write: tuple[int, ...]
    keeps_all: bool


class Loadable:
    """A layer as a model of its own."""

    def __init__(self, layer: GatedDeltaNet) -> None:
        self.finish_loading = layer.finish_loading
        self._layer = layer

    def checkpoint_map(self) -> CheckpointMap:
        return CheckpointMap(parts=self._layer.weight_parts())


class Driver:
    """The layer, and memory for its states."""

    def __init__(self, ops: OpTable) -> None:
        self._ops = ops
        self._layer = GatedDeltaNet(make_context(ops, dtype=torch.float64).at("linear_attn"), SPEC)
        loadable = Loadable(self._layer)
        fill_weights(loadable, seed=2)
        loadable.finish_loading()
        self._layer.cache_index = 1
        layout = KvLayout(layers=(SOME_KV, self._layer.cache_layout))
        self._caches = make_caches(layout, num_pages=12, block_size=1)

    @torch.inference_mode()
    def step(self, rows: list[Row]) -> list[torch.Tensor]:
        """Outputs of each row."""
        lengths = [len(row.x) for row in rows]
        starts = [sum(lengths[:index]) for index in range(len(rows) + 1)]
        batch = ForwardBatch(
            token_ids=torch.zeros(starts[-1], dtype=torch.int64),
            positions=torch.zeros(starts[-1], dtype=torch.int64),
            attention={None: _ranges(starts, num_decode_rows=sum(length == 1 for length in lengths))},
            caches=self._caches,
            sample_index=torch.zeros(0, dtype=torch.int64),
            state=StateMetadata(
                read_page=torch.tensor([row.read for row in rows]),
                write_page=torch.tensor([(*row.write, *[0] * (WIDTH - len(row.write))) for row in rows]),
                keeps_all_cpu=tuple(row.keeps_all for row in rows),
            ),
        )
        y = self._layer(torch.cat([row.x for row in rows]), LayerInputs(batch, self._ops))
        return list(y.split(lengths))


def _ranges(starts: list[int], *, num_decode_rows: int) -> AttentionMetadata:
    num_rows = len(starts) - 1
    return AttentionMetadata(
        block_size=1,
        num_decode_rows=num_decode_rows,
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.zeros(num_rows, dtype=torch.int32),
        block_table=torch.zeros(num_rows, 0, dtype=torch.int32),
        slot=torch.zeros(starts[-1], dtype=torch.int64),
        query_start_cpu=tuple(starts),
        context_len_cpu=(0,) * num_rows,
    )


def hidden(num_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, SPEC.hidden_size, generator=generator, dtype=torch.float64)


@pytest.fixture(params=["torch", "cpu"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(select_ops(OpsConfig(backend=request.param), detect_platform("cpu"), torch.float64))


def test_rejected_drafts_leave_no_trace(driver: Driver) -> None:
    speculating, plain, prompt = hidden(20, seed=0), hidden(20, seed=1), hidden(20, seed=2)
    expected = [driver.step([Row(x, -1, (0,), False)])[0] for x in (speculating, plain, prompt)]
    found: list[list[torch.Tensor]] = [[], [], []]
    first = driver.step([Row(speculating[:6], -1, (3,), False), Row(plain[:6], -1, (10,), False)])
    found[0].append(first[0])
    found[1].append(first[1])
    read, done = 3, 6
    for index, (num_kept, num_drafts) in enumerate([(1, 2), (3, 2), (2, 2), (1, 1), (1, 0), (2, 2), (3, 2)]):
        garbage = hidden(1 + num_drafts - num_kept, seed=100 + index)
        tokens = torch.cat((speculating[done : done + num_kept], garbage))
        # Every other step overwrites the page that it reads.
        write = (read, *(page for page in range(3, 9) if page != read))[: 1 + num_drafts]
        write = write if index % 2 else tuple(page for page in range(3, 9) if page != read)[: 1 + num_drafts]
        rows = [
            Row(plain[6 + index : 7 + index], 10, (10,), False),
            Row(tokens, read, write, True),
            Row(prompt[2 * index : 2 * index + 2], 11 if index else -1, (11,), False),
        ]
        order = [1, 0, 2] if num_drafts == 0 else [0, 1, 2]
        outputs = dict(zip(order, driver.step([rows[place] for place in order])))
        found[1].append(outputs[0])
        found[0].append(outputs[1][:num_kept])
        found[2].append(outputs[2])
        read, done = write[num_kept - 1], done + num_kept
    for parts, whole in zip(found, expected):
        output = torch.cat(parts)
        assert len(output) > 12
        torch.testing.assert_close(output, whole[: len(output)], atol=1e-10, rtol=0)


def test_a_rank_keeps_the_states_of_its_heads_in_float32_or_wider() -> None:
    groups = ProcessGroups(Group(rank=1, size=2, handle=None))
    layer = GatedDeltaNet(make_context(torch_table("test"), dtype=torch.bfloat16, groups=groups).at("mixer"), SPEC)
    assert [(tensor.shape, tensor.dtype) for tensor in layer.cache_layout.tensors] == [
        ((3, 8, 5), "float32"),
        ((31, 3), "bfloat16"),
    ]
    assert layer.cache_layout.describe() == "state:recurrent6x8x5:float32&conv16+16+30x3:bfloat16", "of all ranks"


def test_key_heads_that_do_not_divide_are_refused() -> None:
    groups = ProcessGroups(Group(rank=0, size=4, handle=None))
    with pytest.raises(ConfigError, match="2 key heads of linear attention"):
        GatedDeltaNet(make_context(torch_table("test"), groups=groups).at("mixer"), SPEC)
