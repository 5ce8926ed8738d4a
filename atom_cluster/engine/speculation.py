"""How often drafts come true: counted by position, for metrics and for people. Knows nothing of requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from atom_cluster.observability.metrics import SPEC_ACCEPTED_LENGTH, SPEC_ACCEPTED_TOKENS, SPEC_DRAFT_TOKENS, MetricSink


@dataclass(slots=True)
class DraftStatistics:
    """Since the engine started. Position 0 is the first draft behind a sampled token."""

    metrics: MetricSink
    drafted: list[int] = field(default_factory=list)
    """Drafts that were verified, by position."""
    accepted: list[int] = field(default_factory=list)
    """Those among them that were kept, by position."""

    def note(self, num_drafts: int, num_accepted: int) -> None:
        """A row verified so many drafts and kept the first `num_accepted`."""
        missing = num_drafts - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        self.metrics.observe(SPEC_ACCEPTED_LENGTH, 1 + num_accepted)
        for position in range(num_drafts):
            self.drafted[position] += 1
            self.metrics.inc(SPEC_DRAFT_TOKENS, position=str(position))
            if position < num_accepted:
                self.accepted[position] += 1
                self.metrics.inc(SPEC_ACCEPTED_TOKENS, position=str(position))

    def describe(self) -> str:
        """A few lines: acceptance overall and by position, and tokens per step of a row that had drafts."""
        if not self.drafted:
            return "Speculation: no drafts were verified"
        num_steps, num_drafted, num_accepted = self.drafted[0], sum(self.drafted), sum(self.accepted)
        lines = [
            f"Speculation: {num_steps} steps of rows with drafts, {num_drafted} drafts, {num_accepted} accepted",
            f"  acceptance rate: {num_accepted / num_drafted:.2%}",
            f"  mean accepted length: {1 + num_accepted / num_steps:.3f} tokens per step",
        ]
        for position, (drafted, accepted) in enumerate(zip(self.drafted, self.accepted)):
            lines.append(f"  draft {position + 1}: {accepted / drafted:.2%} of {drafted}")
        return "\n".join(lines)
