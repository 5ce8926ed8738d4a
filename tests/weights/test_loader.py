"""Loading is strict, reads slices, and reports everything at once."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from atom_cluster.errors import WeightsError
from atom_cluster.parallel.sharding import WeightPart, WeightParts, whole
from atom_cluster.weights import pieces
from atom_cluster.weights.loader import load_weights
from atom_cluster.weights.rules import CheckpointMap
from atom_cluster.weights.safetensors_reader import open_checkpoint

A, B = torch.arange(12.0).view(4, 3), torch.arange(6.0).view(2, 3)
EVERY_SECOND = slice(1, None, 2)


class Model:
    def __init__(self, parts: dict[str, WeightParts]) -> None:
        self._parts = parts

    def checkpoint_map(self) -> CheckpointMap:
        return CheckpointMap(parts=self._parts, ignored=(r"layers\.\d+\.inv_freq",))

    def finish_loading(self) -> None:
        raise AssertionError("loading does not finish the model")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def load(folder: Path, parts: dict[str, WeightParts], **options: int) -> None:
    with open_checkpoint(folder) as checkpoint:
        load_weights(Model(parts), checkpoint, **options)


@pytest.fixture(params=[100, 1000, 1 << 20])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces smaller than rows, of some rows, and larger than everything."""
    size: int = request.param
    monkeypatch.setattr(pieces, "PIECE_BYTES", size)
    monkeypatch.setattr(pieces, "_MIN_SEPARATE_BYTES", size // 2)
    return size


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((), ()),
        ((700,), (slice(600, 650),)),
        ((700,), (EVERY_SECOND,)),
        ((30, 50), ()),
        ((30, 50), (slice(3, 29),)),
        ((30, 50), (EVERY_SECOND,)),
        ((30, 50), (slice(None), slice(7, 9))),
        ((30, 50), (slice(2, 2),)),
        ((7, 30, 50), (slice(2, 6),)),
        ((7, 30, 50), (slice(None), slice(20, 30))),
        ((7, 30, 50), (slice(2, 6), EVERY_SECOND)),
        ((7, 30, 50), (slice(None, None, 3), slice(10, 20), slice(None, 40, 4))),
        ((30, 1, 50), (slice(None), slice(None), slice(49, None))),
    ],
)
def test_any_cut_arrives_however_it_is_read(
    tmp_path: Path,
    piece_bytes: int,
    shape: tuple[int, ...],
    cut: tuple[slice, ...],
    is_transposed: bool,
    target_dtype: torch.dtype,
) -> None:
    is_transposed = is_transposed and len(shape) > 1
    stored = torch.randn(shape)
    folder = save(tmp_path, {"before": A, "x": stored, "y": B})
    expected = stored[cut].transpose(-2, -1) if is_transposed else stored[cut]
    target = torch.zeros(expected.shape, dtype=target_dtype)
    parts = {
        "before": whole(torch.zeros(4, 3)),
        "x": WeightPart(target=target, full_shape=shape, cut=cut, is_transposed=is_transposed),
        "y": whole(torch.zeros(2, 3)),
    }
    load(folder, parts, num_threads=3)
    assert torch.equal(target, expected.to(target_dtype))


def test_targets_may_be_views_and_a_tensor_may_have_several(tmp_path: Path, piece_bytes: int) -> None:
    stored = torch.randn(40, 30)
    fused = torch.zeros(20, 33)
    parts = tuple(
        WeightPart(target=fused[start : start + 10, :30], full_shape=(40, 30), cut=(slice(first, first + 10),))
        for start, first in ((0, 25), (10, 5))
    )
    load(save(tmp_path, {"fused": stored}), {"fused": parts})
    assert torch.equal(fused[:, :30], torch.cat([stored[25:35], stored[5:15]]))
    assert not fused[:, 30:].any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn])
def test_quantized_tensors_are_taken_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.randint(0, 256, (12, 64), dtype=torch.uint8).view(dtype)
    target = torch.zeros(stored.shape, dtype=dtype)[3:9]
    part = WeightPart(target=target, full_shape=tuple(stored.shape), cut=(slice(3, 9),))
    load(save(tmp_path, {"codes": stored}), {"codes": part})
    assert torch.equal(target.view(torch.uint8), stored[3:9].view(torch.uint8))


def test_e8m0_scales_can_be_had_as_bytes(tmp_path: Path) -> None:
    codes = torch.randint(0, 255, (6, 4), dtype=torch.uint8)
    targets = torch.zeros(6, 4, dtype=torch.float8_e8m0fnu), torch.zeros(6, 4, dtype=torch.uint8)
    folder = save(tmp_path, {"scale": codes.view(torch.float8_e8m0fnu)})
    for target in targets:
        load(folder, {"scale": whole(target)})
        assert torch.equal(target.view(torch.uint8), codes)


def test_a_scalar_may_be_stored_as_a_vector_of_one(tmp_path: Path) -> None:
    scalar, vector = torch.zeros(()), torch.zeros(1)
    folder = save(tmp_path, {"s": torch.tensor([2.0]), "v": torch.tensor(3.0)})
    load(folder, {"s": whole(scalar), "v": whole(vector)})
    assert (scalar, vector) == (2, 3)


def test_every_problem_is_named_in_one_error_and_nothing_is_read(tmp_path: Path) -> None:
    good = torch.zeros(2, 3)
    stored = {"b": A, "extra": A, "layers.x.inv_freq": A, "layers.1.inv_freq": A, "good": B, "codes": B.to(torch.int8)}
    parts: dict[str, WeightParts] = {name: whole(torch.zeros(2, 3)) for name in ("a", "b", "codes")}
    with pytest.raises(WeightsError) as error:
        load(save(tmp_path, stored), {**parts, "good": whole(good)})
    assert str(error.value).splitlines()[1:] == [
        "  missing: a",
        "  unused: extra",
        "  unused: layers.x.inv_freq",
        "  wrong shape: b is [4, 3], the model needs [2, 3]",
        "  wrong dtype: codes is I8, the model needs float32",
    ]
    assert not good.any()


@pytest.mark.parametrize(
    ("stored", "target"),
    [(torch.float8_e4m3fn, torch.bfloat16), (torch.int8, torch.uint8), (torch.float32, torch.float8_e4m3fn)],
)
def test_what_is_not_alike_is_not_converted(tmp_path: Path, stored: torch.dtype, target: torch.dtype) -> None:
    with pytest.raises(WeightsError, match="wrong dtype: a"):
        load(save(tmp_path, {"a": A.to(stored)}), {"a": whole(torch.zeros(4, 3).to(target))})


def test_problems_of_many_experts_are_told_in_a_line(tmp_path: Path) -> None:
    names = [f"layers.{layer}.experts.{expert}.w1.weight" for layer in range(3) for expert in range(20)]
    parts: dict[str, WeightParts] = {name: whole(torch.zeros(1)) for name in names}
    many_kinds: dict[str, WeightParts] = {"x" * length: whole(torch.zeros(1)) for length in range(1, 61)}
    with pytest.raises(WeightsError) as error:
        load(save(tmp_path, {"a": A}), {"a": whole(torch.zeros(4, 3)), **parts, **many_kinds})
    lines = str(error.value).splitlines()[1:]
    assert lines[0] == "  missing: layers.0.experts.0.w1.weight (and 59 more of layers.*.experts.*.w1.weight)"
    assert len(lines) == 40
    assert lines[-1] == "  missing: ... and 22 more"


def test_a_file_that_is_cut_short_while_it_is_open_is_told(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.zeros(1000, 1000)})
    with open_checkpoint(tmp_path) as checkpoint:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(1_000_000)
        with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
            load_weights(Model({"a": whole(torch.zeros(1000, 1000))}), checkpoint)


def test_progress_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "atom_cluster.weights"):
        load(save(tmp_path, {"a": torch.zeros(1000, 10_000)}), {"a": whole(torch.zeros(1000, 10_000))})
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert first == f"reading 0.04 GB in 1 files of {tmp_path}"
    assert last.startswith("finished: 0.04 of 0.04 GB in ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=pytest.mark.multi_gpu)])
def test_devices_are_fed_through_buffers_that_are_not_reused_too_early(
    tmp_path: Path, piece_bytes: int, device: str, dtype: torch.dtype
) -> None:
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("torch sees fewer than two devices")
    stored = torch.randn(64, 300, 50)
    folder = save(tmp_path, {"x": stored, "y": stored + 1})
    cuts = {"x": (slice(None), slice(10, 200)), "y": (slice(None), slice(None), slice(0, 25))}
    targets = {name: torch.zeros(stored[cut].shape, dtype=dtype, device=device) for name, cut in cuts.items()}
    with torch.cuda.device(device):
        torch.cuda._sleep(200_000_000)  # copies queue up behind this tenth of a second
    load(
        folder,
        {name: WeightPart(target=targets[name], full_shape=(64, 300, 50), cut=cut) for name, cut in cuts.items()},
    )
    assert torch.equal(targets["x"].cpu(), stored[cuts["x"]].to(dtype))
    assert torch.equal(targets["y"].cpu(), (stored + 1)[cuts["y"]].to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no device")
def test_targets_may_be_on_different_devices(tmp_path: Path, piece_bytes: int) -> None:
    stored = torch.randn(64, 30)
    folder = save(tmp_path, {name: stored + number for number, name in enumerate("abc")})
    targets = {name: torch.zeros(64, 7, device=device) for name, device in zip("abc", ("cuda", "cpu", "cuda"))}
    cut = (slice(None), slice(3, 10))
    load(folder, {name: WeightPart(target=t, full_shape=(64, 30), cut=cut) for name, t in targets.items()})
    for number, target in enumerate(targets.values()):
        assert torch.equal(target.cpu(), (stored + number)[cut])
