"""What every launcher promises, over threads of this process and Ray actors."""

import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from infra.launch import Exit, Handle, Launcher, Resources
from infra.local_launch import ThreadLauncher
from infra.ray_launch import RayLauncher
from tests.infra import launched

SMALL = Resources(num_cpus=0.25)
PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module", params=["threads", "ray"])
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    launcher = ThreadLauncher(num_cpus=2) if request.param == "threads" else RayLauncher(num_cpus=2)
    yield launcher
    launcher.close()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def end_of(handle: Handle) -> Exit:
    wait_for(handle.poll)
    ended = handle.poll()
    assert ended is not None
    return ended


def receive(handle: Handle, number: int) -> list[object]:
    messages: list[object] = []
    while len(messages) < number and (arrived := handle.channel.receive(PATIENCE_SECONDS)):
        messages += arrived
    return messages


def test_messages_travel_both_ways_in_order(launcher: Launcher) -> None:
    handle = launcher.launch(launched.echo, "echo", SMALL)
    for number in range(2000):
        handle.channel.send(number)
    assert receive(handle, 2000) == list(range(2000))
    assert handle.poll() is None
    handle.channel.send("end")
    assert end_of(handle) == Exit("returned")


def test_everything_sent_waits_when_the_task_has_returned(launcher: Launcher) -> None:
    handle = launcher.launch(launched.count_and_return, "count", SMALL)
    assert end_of(handle).kind == "returned"
    assert handle.channel.receive(0.0) == list(range(500))
    assert handle.channel.receive(PATIENCE_SECONDS) == []
    assert handle.channel.closed


def test_killing_what_has_ended_takes_nothing_away(launcher: Launcher) -> None:
    handle = launcher.launch(launched.count_and_return, "ended", SMALL)
    ended = end_of(handle)
    handle.kill()
    assert handle.poll() == ended
    assert handle.channel.receive(0.0) == list(range(500))


def test_an_error_for_people_arrives_as_its_own_sentence(launcher: Launcher) -> None:
    handle = launcher.launch(launched.raise_bad_input, "bad", SMALL)
    ended = end_of(handle)
    assert (ended.kind, ended.reason) == ("raised", "r must be at most 64, got 128; lower it.")
    assert "raise_bad_input" in ended.details
    assert handle.channel.receive(0.0) == ["before"]


def test_any_other_error_arrives_as_one_line_with_its_type(launcher: Launcher) -> None:
    ended = end_of(launcher.launch(launched.raise_key_error, "key", SMALL))
    assert ended.kind == "raised"
    assert ended.reason.startswith("KeyError: ")
    assert "\n" not in ended.reason


def test_a_message_that_cannot_travel_fails_at_its_sender_only(launcher: Launcher) -> None:
    handle = launcher.launch(launched.send_what_cannot_travel, "lambda", SMALL)
    error, still_here = receive(handle, 2)
    assert error in {"PicklingError", "AttributeError"}
    assert still_here == "still here"
    assert end_of(handle).kind == "returned"


def test_a_message_is_a_copy(launcher: Launcher) -> None:
    handle = launcher.launch(launched.change_what_was_sent, "copy", SMALL)
    assert end_of(handle).kind == "returned"
    assert handle.channel.receive(0.0) == [["sent"]]


def test_receive_comes_back_empty_after_its_time_out(launcher: Launcher) -> None:
    handle = launcher.launch(launched.echo, "silent", SMALL)
    assert handle.channel.receive(0.05) == []
    assert not handle.channel.closed
    handle.channel.send("end")
    assert end_of(handle).kind == "returned"


def test_a_killed_task_ends_and_its_channel_is_closed(launcher: Launcher) -> None:
    handle = launcher.launch(launched.echo, "victim", SMALL)
    handle.channel.send("hello")
    assert receive(handle, 1) == ["hello"]
    handle.kill()
    assert handle.channel.closed
    handle.channel.send("dropped")
    assert handle.channel.receive(PATIENCE_SECONDS) == []
    assert end_of(handle).kind in {"lost", "returned"}
    handle.kill()


def test_a_name_is_taken_while_its_task_lives(launcher: Launcher) -> None:
    handle = launcher.launch(launched.echo, "taken", SMALL)
    with pytest.raises(ValueError, match="taken"):
        launcher.launch(launched.echo, "taken", SMALL)
    handle.channel.send("end")
    end_of(handle)
    again = launcher.launch(launched.count_and_return, "taken", SMALL)
    assert end_of(again).kind == "returned"


def test_a_running_task_tells_its_process(launcher: Launcher) -> None:
    handle = launcher.launch(launched.echo, "place", SMALL)
    wait_for(lambda: handle.place)
    assert handle.place is not None
    assert psutil.pid_exists(handle.place.pid)
    handle.channel.send("end")
    end_of(handle)


@pytest.mark.parametrize(
    ("resources", "number"),
    [(Resources(num_cpus=1), 2), (Resources(num_cpus=0.25), 8), (Resources(num_cpus=64), 1), (Resources(num_gpus=512), 1)],
)
def test_capacity_follows_from_what_there_is(launcher: Launcher, resources: Resources, number: int) -> None:
    assert launcher.capacity(resources) == number


def test_close_ends_what_still_runs(launcher: Launcher) -> None:
    second = type(launcher)()
    handle = second.launch(launched.echo, "left over", SMALL)
    second.close()
    assert end_of(handle).kind in {"lost", "returned"}
