"""A file of keys says who they are without containing them."""

from __future__ import annotations

import pytest

from atom_cluster.api.protection.keys import MAX_KEY_CHARS, hash_key, make_key, parse_keys
from atom_cluster.config.protection import MAX_KEYS
from atom_cluster.errors import ConfigError

KEY, OTHER = "atom-" + "k" * 43, "atom-" + "o" * 43


def line(name: str, key: str, rest: str = "") -> str:
    return f"- {{name: {name}, sha256: {hash_key(key)}{rest}}}\n"


def test_keys_are_long_random_and_recognisable() -> None:
    made = [make_key() for _ in range(100)]
    assert len(set(made)) == 100
    assert all(key.startswith("atom-") and len(key) == len("atom-") + 43 for key in made)


def test_a_key_is_found_by_its_hash_and_no_other_is() -> None:
    ring = parse_keys(line("a", KEY, ", role: admin, requests_per_minute: 5") + line("b", OTHER), source="file")
    found = ring.find(KEY)
    assert found is not None and (found.name, found.role, found.requests_per_minute) == ("a", "admin", 5)
    assert ring.find(OTHER) is ring.entries[1]
    for wrong in ("", KEY[:-1], KEY + "x", hash_key(KEY), "\ud800", "\x00", "x" * (MAX_KEY_CHARS + 1)):
        assert ring.find(wrong) is None


def test_entries_may_stand_under_a_heading() -> None:
    text = f"keys:\n  - name: a\n    sha256: {hash_key(KEY)}\n    role: monitor\n"
    assert parse_keys(text, source="file").entries[0].role == "monitor"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "valid dictionary"),
        ("[]", "at least 1 item"),
        ("- {name: a", "not valid YAML at line 1"),
        ("- {name: a}", "keys.0.sha256: Field required"),
        (f"- {{name: a, sha256: {KEY}}}", "keys.0.sha256: String should match"),
        (line("a b", KEY), "keys.0.name: String should match"),
        (line("a", KEY, ", role: root"), "keys.0.role"),
        (line("a", KEY, ", requests_per_minute: 0"), "keys.0.requests_per_minute"),
        (line("a", KEY, ", requests: 5"), "keys.0.requests: unknown key"),
        (line("a", KEY) + line("a", OTHER), "a name is there twice: a"),
        (line("a", KEY) + line("b", KEY), "two names have the same key"),
        ("".join(line(f"k{number}", f"{number}") for number in range(MAX_KEYS + 1)), "at most 1000 items"),
        ("- !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("- {name: a, sha256: 2020-13-45}", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_without_any_value(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, source="/etc/keys.yaml")
    assert str(caught.value).startswith("/etc/keys.yaml: ") and words in str(caught.value)
    assert KEY not in str(caught.value) and hash_key(KEY) not in str(caught.value)
    assert caught.value.__cause__ is None
