import json
from pathlib import Path

import pytest

from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout
from atom_cluster.runner import fingerprint
from atom_cluster.runner.fingerprint import fingerprint_fields, weights_identity

LAYOUT = KvLayout(layers=(KvLayerLayout(num_kv_heads=1, key_dim=2, value_dim=2, dtype="float32"),))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "5.0"}))
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    return tmp_path


def fields(model_dir: Path, layout: KvLayout = LAYOUT, **changes: str) -> dict[str, str]:
    values = {"weights": "w", "quantization": "none", "dtype": "bfloat16", "drafting": "0"} | changes
    return fingerprint_fields(model_dir, layout=layout, **values)


def test_equal_settings_have_equal_fields(model_dir: Path) -> None:
    assert fields(model_dir) == fields(model_dir)


def test_each_setting_that_changes_kv_changes_its_field(model_dir: Path) -> None:
    first = fields(model_dir)
    for name in ("weights", "quantization", "dtype", "drafting"):
        other = fields(model_dir, **{name: "another"})
        assert {name for name in first if first[name] != other[name]} == {name}


def test_ranks_of_a_divided_model_have_the_fields_of_a_whole_one(model_dir: Path) -> None:
    whole, divided, other = (
        KvLayout(
            layers=(KvLayerLayout(num_kv_heads=n, all_kv_heads=all_heads, key_dim=2, value_dim=2, dtype="float32"),)
        )
        for n, all_heads in ((4, 4), (2, 4), (4, 8))
    )
    assert fields(model_dir, whole) == fields(model_dir, divided) != fields(model_dir, other)


def test_another_version_of_the_code_is_another_fingerprint(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fields(model_dir)
    monkeypatch.setattr(fingerprint, "KV_FORMAT", fingerprint.KV_FORMAT + 1)
    assert {name for name in first if first[name] != fields(model_dir)[name]} == {"code"}


def test_the_version_that_wrote_the_config_does_not_matter_but_its_values_do(model_dir: Path) -> None:
    first = fields(model_dir)
    (model_dir / "config.json").write_text(json.dumps({"transformers_version": "6.0", "hidden_size": 8}))
    assert fields(model_dir) == first
    (model_dir / "config.json").write_text(json.dumps({"hidden_size": 9}))
    assert fields(model_dir)["config"] != first["config"]


def test_weights_differ_by_content_and_by_size(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    content = path.read_bytes()
    first = weights_identity(model_dir, load_format="safetensors", seed=0)
    assert weights_identity(model_dir, load_format="safetensors", seed=1) == first
    path.write_bytes(content[:-1])
    assert weights_identity(model_dir, load_format="safetensors", seed=0) != first
    path.write_bytes(content.replace(b"\x07", b"\x08"))
    assert weights_identity(model_dir, load_format="safetensors", seed=0) != first


def test_dummy_weights_are_identified_by_their_seed(model_dir: Path) -> None:
    assert weights_identity(model_dir, load_format="dummy", seed=0) != weights_identity(
        model_dir, load_format="dummy", seed=1
    )
