"""What `benchmarks.disaggregation` finds: its rows, for people and as JSON to keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.goodput import Goodput
from benchmarks.records import save_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """Single prompts of one length; medians over the repeats, in milliseconds."""

    num_prompt_tokens: int
    ttft_ms: float
    publish_ms: float
    read_ms: float
    share_of_ttft: float
    """(publish + read) / TTFT."""
    unified_ttft_ms: float
    num_handed_over: int
    """Of the repeats."""
    num_bytes: float
    """That one repeat read."""

    def __str__(self) -> str:
        exposed_ms = self.publish_ms + self.read_ms
        return (
            f"{self.num_prompt_tokens:6d} tokens: TTFT {self.ttft_ms:8.2f} ms, exposed {exposed_ms:6.2f} ms = "
            f"{self.share_of_ttft:6.2%} (publish {self.publish_ms:6.2f}, read {self.read_ms:6.2f}), unified "
            f"{self.unified_ttft_ms:8.2f} ms, {self.num_bytes / 1e6:8.1f} MB, {self.num_handed_over} handed over"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Equal:
    """The same requests through both engines and through one."""

    num_requests: int
    num_equal: int
    """Requests all of whose token ids are equal."""
    largest_logprob_difference: float
    """Over all tokens before the first that differs."""
    num_handed_over: int

    @property
    def is_right(self) -> bool:
        """Whether all are equal, to the last bit, and prefill had a part in it."""
        is_same = self.num_equal == self.num_requests and self.largest_logprob_difference == 0
        return is_same and self.num_handed_over > 0

    def __str__(self) -> str:
        return (
            f"{self.num_equal} of {self.num_requests} outputs equal, log probabilities differ by at most "
            f"{self.largest_logprob_difference:.3g}, {self.num_handed_over} handed over"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Disaggregated against unified: good requests per second, at the rate that is best for each."""

    best_per_s: dict[str, float]
    ratio: float | None
    """None: unified has no good requests."""
    ratio_by_rate: list[float | None]
    best_by_p99_per_s: dict[str, float]
    """Counting requests whose 99th percentile between tokens, not their mean, is as promised."""
    ratio_by_p99: float | None


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs else None


class Results:
    """What was found so far."""

    def __init__(self, *, label: str, is_saved: bool, details: dict[str, Any]) -> None:
        """label: of the file that everything is written to after each addition, if it is to be saved."""
        self.goodputs: dict[str, list[Goodput]] = {}
        """By layout, one for each rate."""
        self.details = details
        self.is_equal = True
        """Whether outputs were as they have to be; also if they were not compared."""
        self._label = label
        self._is_saved = is_saved
        self._path: Path | None = None

    def add(self, **details: Any) -> None:
        """Keep this, and save all if asked to."""
        self.details.update(details)
        if self._is_saved:
            is_first = self._path is None
            self._path = save_record("disaggregation", self._label, self.details, path=self._path)
            if is_first:
                print(f"saving to {self._path}")

    def compare(self) -> None:
        """The ratio of goodputs, if both layouts were measured."""
        if set(self.goodputs) != {"disaggregated", "unified"}:
            return
        rates = {layout: [found.goodput_per_s for found in runs] for layout, runs in self.goodputs.items()}
        strict = {layout: [found.goodput_by_p99_per_s for found in runs] for layout, runs in self.goodputs.items()}
        comparison = Comparison(
            best_per_s={layout: max(found) for layout, found in rates.items()},
            ratio=_ratio(max(rates["disaggregated"]), max(rates["unified"])),
            ratio_by_rate=[_ratio(*pair) for pair in zip(rates["disaggregated"], rates["unified"])],
            best_by_p99_per_s={layout: max(found) for layout, found in strict.items()},
            ratio_by_p99=_ratio(max(strict["disaggregated"]), max(strict["unified"])),
        )
        print(comparison)
        self.add(comparison=asdict(comparison))
