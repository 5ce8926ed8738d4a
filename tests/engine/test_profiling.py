from __future__ import annotations

from atom_cluster.engine.profiling import ProfileDesk
from atom_cluster.messages.profile import (
    CloseWindow,
    OpenWindow,
    ProfileAnswer,
    StartProfile,
    StopProfile,
    WindowWritten,
)
from tests.engine.test_core import Single
from tests.fakes import ListOutbox

OPENED = OpenWindow(window_id=0, replica="d", time="now", num_steps=5, with_stack=True, record_shapes=None)
WRITTEN = WindowWritten(window_id=0, files=("trace",))


class Desk:
    """A desk whose answers are looked at one by one."""

    def __init__(self, refusal: str = "") -> None:
        self.outbox = ListOutbox()
        self.desk = ProfileDesk(refusal=refusal, replica="d", outbox=self.outbox, local_time=lambda: "now")

    def start(self, call_id: int = 1, client: str = "c") -> None:
        self.desk.start(client, StartProfile(call_id=call_id, num_steps=5, with_stack=True))

    def stop(self, call_id: int = 2, client: str = "c") -> None:
        self.desk.stop(client, StopProfile(call_id=call_id))

    def answer(self, client: str = "c") -> ProfileAnswer:
        (sent,) = self.outbox.sent
        self.outbox.sent.clear()
        assert sent[0] == client
        assert isinstance(sent[1], ProfileAnswer)
        return sent[1]


def test_a_window_is_opened_and_closed_and_its_traces_are_the_answer() -> None:
    desk = Desk()
    desk.start()
    assert desk.answer() == ProfileAnswer(call_id=1)
    assert desk.desk.take_command() == OPENED
    desk.stop()
    assert desk.desk.take_command() == CloseWindow(window_id=0)
    assert not desk.outbox.sent and desk.desk.is_waiting and not desk.desk.has_command
    desk.desk.on_written(WRITTEN)
    assert desk.answer() == ProfileAnswer(call_id=2, files=("trace",))
    assert not desk.desk.is_waiting


def test_a_second_start_is_refused_until_the_traces_are_written() -> None:
    desk = Desk()
    desk.start()
    desk.answer()
    desk.start(3, "other")
    assert "a window is open already" in (desk.answer("other").error or "")
    desk.stop()
    desk.start(4)
    assert "still being written" in (desk.answer().error or "")
    desk.desk.on_written(WRITTEN)
    desk.answer()
    desk.start(5)
    assert desk.answer().error is None


def test_a_stop_without_a_start_is_refused() -> None:
    desk = Desk()
    desk.stop()
    assert desk.answer() == ProfileAnswer(call_id=2, error="no window is open: start one first")


def test_the_traces_of_a_window_that_ended_by_itself_wait_for_whoever_stops_it() -> None:
    desk = Desk()
    desk.start()
    desk.answer()
    desk.desk.on_written(WRITTEN)
    assert not desk.outbox.sent
    desk.stop()
    assert desk.answer().files == ("trace",)
    desk.stop()
    assert desk.answer().error is not None


def test_several_may_wait_for_the_same_traces() -> None:
    desk = Desk()
    desk.start()
    desk.answer()
    desk.stop(2, "a")
    desk.stop(3, "b")
    desk.desk.on_written(WRITTEN)
    assert [client for client, _ in desk.outbox.sent] == ["a", "b"]
    assert [desk.desk.take_command(), desk.desk.take_command(), desk.desk.take_command()] == [
        OPENED,
        CloseWindow(window_id=0),
        None,
    ]


def test_an_engine_without_a_directory_refuses_with_the_reason() -> None:
    desk = Desk("set observability.profile.directory")
    desk.start()
    assert desk.answer().error == "set observability.profile.directory"
    desk.stop()
    assert desk.answer().error == "set observability.profile.directory"


def test_whoever_waits_for_traces_of_an_engine_that_failed_is_told() -> None:
    desk = Desk()
    desk.start()
    desk.answer()
    desk.stop()
    desk.desk.fail("the engine failed")
    assert desk.answer() == ProfileAnswer(call_id=2, error="the engine failed")


def test_a_simulated_engine_says_that_it_records_nothing() -> None:
    single = Single()
    answers: list[ProfileAnswer] = []
    post = single.network.post

    def spy(source: str, destination: object, message: object) -> None:
        if isinstance(message, ProfileAnswer):
            answers.append(message)
        else:
            post(source, destination, message)  # type: ignore[arg-type]

    single.network.post = spy  # type: ignore[method-assign]
    single.engine.put("ingress", StartProfile(call_id=9))
    assert not single.engine.step()
    assert answers == [ProfileAnswer(call_id=9, error="this engine records no traces")]
