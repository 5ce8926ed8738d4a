"""What must be equal for the KV blocks of two engines to mean the same. Knows no tensors and no messages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import atom_cluster
from atom_cluster.kv_cache.layout import KvLayout

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096
_IRRELEVANT_CONFIG_KEYS = frozenset({"_name_or_path", "transformers_version"})


def fingerprint_fields(
    model_dir: Path, *, weights: str, layout: KvLayout, block_size: int, world_size: int
) -> dict[str, str]:
    """Named facts, compared one by one when two engines meet. `weights` is `weights_identity` of the directory."""
    return {
        "config": _config_digest(model_dir),
        "weights": weights,
        "kv_layout": layout.describe(),
        "block_size": str(block_size),
        "tensor_parallel": str(world_size),
        "code": atom_cluster.__version__,
    }


def weights_identity(model_dir: Path, *, load_format: str, seed: int) -> str:
    """Tells checkpoints apart without reading them whole: sizes, and 64 samples of 4 KiB spread over each file.

    So two fine-tunes of one model differ, and gigabytes are not read. Dummy weights are identified by their seed.
    """
    if load_format == "dummy":
        return f"dummy seed {seed}"
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(model_dir.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name}:{num_bytes}".encode())
        with path.open("rb") as file:
            for sample in range(_NUM_SAMPLES):
                file.seek(num_bytes * sample // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _config_digest(model_dir: Path) -> str:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT_CONFIG_KEYS}
    return hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=8).hexdigest()
