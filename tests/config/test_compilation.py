"""Which sizes of steps are captured."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from atom_cluster.config.compilation import CompilationConfig


def test_decode_steps_are_captured_up_to_the_most_requests() -> None:
    assert CompilationConfig().sizes(10) == (1, 2, 3, 4, 5, 6, 7, 8, 10)
    assert CompilationConfig(max_capture_rows=6).sizes(10) == (1, 2, 3, 4, 5, 6)
    assert CompilationConfig(capture_sizes=(4, 32, 2)).sizes(10) == (2, 4)
    assert CompilationConfig(graph_mode="none").sizes(10) == ()
    with pytest.raises(ValidationError, match="capture_sizes"):
        CompilationConfig(capture_sizes=(0, 4))


def test_steps_with_prompts_are_captured_up_to_the_most_tokens() -> None:
    config = CompilationConfig()
    assert config.piecewise_sizes(40) == (16, 32, 40)
    assert config.piecewise_sizes(48) == (16, 32, 48)
    assert config.piecewise_sizes(2000)[-2:] == (1792, 2000)
    assert config.piecewise_sizes(100_000)[-2:] == (3584, 4096)
    assert CompilationConfig(capture="lazy").piecewise_sizes(100_000)[-2:] == (1792, 2048)
    for mode in ("none", "full"):
        assert CompilationConfig(graph_mode=mode).piecewise_sizes(100) == ()


def test_a_step_is_filled_up_by_a_third_at_most() -> None:
    sizes = CompilationConfig().piecewise_sizes(1 << 20)
    assert list(sizes) == sorted(set(sizes))
    assert all(after <= before * 1.34 for before, after in zip(sizes[2:], sizes[3:]))
