"""Writes docs/model_memory.md: each shipped configuration on each known accelerator, by `check-config`'s arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from atom_cluster.config.accelerators import ACCELERATORS
from atom_cluster.config.load import load_file
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.runner.memory_plan import RankMemory, RankShape
from atom_cluster.tools.check_config import resolve_for
from atom_cluster.tools.memory_table import plan_groups
from atom_cluster.tools.model_source import find_model
from atom_cluster.units import GiB

_HEAD = """\
# What fits

*Generated from the files in `configs/` by `scripts/gen-memory-docs`; do not edit.*

What `atom-cluster check-config FILE --accelerator NAME` says of each configuration, of one rank of the group that
decodes. Weights and KV are counted by the code that loads and sizes them, from shapes alone. What the device's runtime
takes and what the largest step needs are estimates: on H200, engines that were started measured 0.5 to 0.6 GiB for
the runtime (1.3 with several ranks; 1.0 with weights quantized while they were loaded) and a step within 12 % of the
estimate. On MI300X and MI355X nothing was measured, and none of these checkpoints has been loaded: an engine measures
both when it starts, and says what it found. `requests` are those of 8192 tokens that a replica runs at once,
`scheduler.max_num_requests` at most.

Accelerators: {accelerators}.
"""


def render(configs: Path) -> str:
    """The page about all files in a directory that configure groups on GPUs."""
    known = ", ".join(f"{one.name} ({one.memory_bytes / GiB:.1f} GiB)" for one in ACCELERATORS.values())
    lines = [_HEAD.format(accelerators=known)]
    columns = ["configuration", "GPUs", "weights", "KV of a token"]
    columns += [f"{name}: KV tokens, requests" for name in ACCELERATORS]
    lines += [_row(columns), _row(["---"] * len(columns))]
    measured: dict[str, dict[RankShape, RankMemory]] = {}
    lines += [_row(cells) for path in sorted(configs.glob("*.yaml")) if (cells := _cells(path, measured))]
    return "\n".join(lines) + "\n"


def _cells(path: Path, measured: dict[str, dict[RankShape, RankMemory]]) -> list[str]:
    """The row of a file; nothing for one without GPUs. measured: by model."""
    (application,) = load_file(path).applications
    config = application.args
    if any(group.device != "cuda" for group in config.groups().values()):
        return []
    model, of_model = find_model(config.model), measured.setdefault(config.model, {})
    groups = []
    for accelerator in ACCELERATORS.values():
        resolved, planned = resolve_for(config, model, accelerator)
        groups.append(plan_groups(resolved.config, HfConfig(model.values), planned, measured=of_model)[-1])
    memory = groups[0].memory
    gpus = " + ".join(str(group.max_ranks) for group in config.groups().values())
    cells = [f"`configs/{path.name}`", gpus, f"{memory.weight_bytes / GiB:.1f} GiB"]
    cells.append(f"{memory.kv_bytes_per_token / 1000:.1f} kB")
    return [*cells, *(f"{group.num_tokens:,}, {memory.num_requests(group.num_blocks, 8192)}" for group in groups)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page PATH about the files in CONFIGS, or with --check only compare. Returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_check = "--check" in given
    page, configs = (Path(one) for one in given if one != "--check")
    text = render(configs)
    if not is_check:
        page.write_text(text, encoding="utf-8")
    elif not page.exists() or page.read_text(encoding="utf-8") != text:
        print(f"{page} is not current: run scripts/gen-memory-docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
