"""What must be equal for the KV blocks of two engines to mean the same. Knows no tensors and no messages.

Not in it is what may differ (`messages.transfer.KvPlacement`: number of ranks, block size), and what each engine
decides for itself: numbers of blocks and rows, limits of lengths.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import atom_cluster
from atom_cluster.kv_cache.layout import KvLayout

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096
KV_FORMAT = 1
"""Of pages, tags and the messages about them. Raise it with any change of these."""
_IRRELEVANT_CONFIG_KEYS = frozenset({"_name_or_path", "transformers_version"})


def fingerprint_fields(
    model_dir: Path, *, weights: str, quantization: str, dtype: str, layout: KvLayout, drafting: str
) -> dict[str, str]:
    """Named facts, compared one by one when two engines meet.

    `weights` is `weights_identity` of the directory, `quantization` what is done to them while they are loaded, `dtype`
    what is computed in, `drafting` what drafts how many tokens: prefill hands its drafts over, too.
    """
    return {
        "config": _config_digest(model_dir),
        "weights": weights,
        "quantization": quantization,
        "dtype": dtype,
        "kv_layout": layout.describe(),
        "drafting": drafting,
        "code": f"{atom_cluster.__version__}, KV format {KV_FORMAT}",
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
