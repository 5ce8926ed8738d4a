"""What a rank of test_build.py runs. Apart from the tests, so that its process imports no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

from atom_cluster.messages.steps import StepPlan
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions

Tokens = list[tuple[tuple[int, ...], ...]]


def run_plans(settings: RunnerOptions, plans: Sequence[StepPlan]) -> Tokens:
    """Sampled tokens of each step."""
    runner = build_model_runner(settings)
    try:
        results = [runner.run(plan) for plan in plans]
    finally:
        runner.close()
    return [tuple(sampled.token_ids for sampled in result.sampled) for result in results]


def run_and_send(settings: RunnerOptions, plans: Sequence[StepPlan], connection: Connection) -> None:
    connection.send(run_plans(settings, plans))
