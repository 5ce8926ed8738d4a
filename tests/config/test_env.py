from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster.config.env import read_environment
from atom_cluster.errors import ConfigError

SECRET = "correct horse battery staple"


def test_nothing_set_means_no_secret_and_the_default_cache() -> None:
    environment = read_environment({})
    assert environment.secret is None
    assert environment.cache_dir == Path.home() / ".cache" / "atom_cluster"


def test_a_secret_comes_from_the_variable_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    assert read_environment({"ATOM_CLUSTER_SECRET": SECRET}).secret == SECRET.encode()
    assert read_environment({"ATOM_CLUSTER_SECRET_FILE": str(file)}).secret == SECRET.encode()


def test_the_secret_is_not_shown() -> None:
    assert SECRET not in repr(read_environment({"ATOM_CLUSTER_SECRET": SECRET}))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ATOM_CLUSTER_SECRET": "short"}, "ATOM_CLUSTER_SECRET: the secret has 5 bytes"),
        ({"ATOM_CLUSTER_SECRET": SECRET, "ATOM_CLUSTER_SECRET_FILE": "/x"}, "not both"),
        ({"ATOM_CLUSTER_SECRET_FILE": "/does/not/exist"}, "ATOM_CLUSTER_SECRET_FILE: cannot read"),
        (
            {"ATOM_CLUSTER_API_KEYS_FILE": "keys.yaml"},
            "ATOM_CLUSTER_API_KEYS_FILE: `keys.yaml` is not an absolute path",
        ),
        ({"ATOM_CLUSTER_CACHE": "relative/path"}, "ATOM_CLUSTER_CACHE: `relative/path` is not an absolute path"),
    ],
)
def test_a_bad_value_names_the_variable(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_environment(variables)


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATOM_CLUSTER_CACHE", str(tmp_path))
    assert read_environment().cache_dir == tmp_path


def test_the_file_of_api_keys_is_named_and_not_read() -> None:
    assert read_environment({}).api_keys_file is None
    assert read_environment({"ATOM_CLUSTER_API_KEYS_FILE": "/x/keys"}).api_keys_file == Path("/x/keys")
