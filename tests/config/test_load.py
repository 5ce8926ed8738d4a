from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster.config.load import load_args, load_file, read_yaml
from atom_cluster.errors import ConfigError

GOOD = """
http_options: {host: 127.0.0.1, port: 8000}
applications:
- name: atom
  import_path: deployments.disaggregated:build
  args:
    model: some/model
    prefill: {replicas: 1}
    decode: {replicas: 2}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "cluster.yaml"
    path.write_text(text)
    return path


def error_of(directory: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_file(write(directory, text))
    return str(caught.value)


def test_a_file_becomes_configuration(tmp_path: Path) -> None:
    config = load_file(write(tmp_path, GOOD)).applications[0].args
    assert config.model == "some/model"
    assert config.decode is not None
    assert config.decode.replicas == 2


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("http_options", "http_option", "http_option: unknown key; did you mean `http_options`?"),
        ("port", "prot", "http_options.prot: unknown key; did you mean `port`?"),
        ("import_path", "importpath", "applications[0].importpath: unknown key; did you mean `import_path`?"),
        ("args", "argz", "applications[0].argz: unknown key; did you mean `args`?"),
        ("prefill", "prefil", "applications[0].args.prefil: unknown key; did you mean `prefill`?"),
        ("{replicas: 2}", "{replica: 2}", "applications[0].args.decode.replica: unknown key; did you mean `replicas`?"),
    ],
)
def test_a_typo_anywhere_is_named_with_its_path(tmp_path: Path, right: str, wrong: str, problem: str) -> None:
    assert problem in error_of(tmp_path, GOOD.replace(right, wrong, 1))


def test_a_typo_in_a_deployment_override_is_named(tmp_path: Path) -> None:
    text = GOOD + "  deployments:\n  - {name: Ingress, num_replica: 2}\n"
    assert "applications[0].deployments[0].num_replica: unknown key; did you mean `num_replicas`?" in error_of(
        tmp_path, text
    )


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("port: 8000", "port: eight").replace("model:", "modell:").replace("replicas: 2", "replicas: 0")
    message = error_of(tmp_path, text)
    assert "has 4 problems" in message
    for path in ("http_options.port:", "args.modell:", "args.model:", "args.decode.replicas:"):
        assert path in message


def test_the_listening_address_must_be_given(tmp_path: Path) -> None:
    assert "http_options.host: Field required" in error_of(tmp_path, GOOD.replace("host: 127.0.0.1, ", ""))


def test_a_value_of_several_types_is_one_problem() -> None:
    with pytest.raises(
        ConfigError, match=r"^args has a problem:\n  cache\.num_blocks: .*, or: Input should be 'auto'$"
    ):
        load_args({"model": "m", "unified": {}, "cache": {"num_blocks": "many"}})


def test_auto_may_be_written_out() -> None:
    assert load_args({"model": "m", "unified": {}, "cache": {"num_blocks": "auto"}}).cache.num_blocks == "auto"


def test_a_file_without_applications_is_refused(tmp_path: Path) -> None:
    assert "give at least one application" in error_of(tmp_path, "http_options: {host: h}\napplications: []\n")


@pytest.mark.parametrize("text", ["", "just text", "- a list", "5"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "cluster.yaml has a problem" in error_of(tmp_path, text)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    assert "key `prefill` twice" in error_of(tmp_path, GOOD + "    prefill: {replicas: 3}\n")


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = write(tmp_path, "base: &base {replicas: 2}\ngroup:\n  <<: *base\n  device: cpu\n")
    assert read_yaml(path) == {"base": {"replicas": 2}, "group": {"replicas": 2, "device": "cpu"}}


@pytest.mark.parametrize("text", ["a: [", "a: !!python/object/apply:os.getcwd []"])
def test_bad_and_dangerous_yaml_is_refused(tmp_path: Path, text: str) -> None:
    assert "is not valid YAML" in error_of(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.yaml"):
        load_file(tmp_path / "absent.yaml")
