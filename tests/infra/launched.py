"""Tasks for the launcher tests: they stand in a module of their own, since the launched process imports them."""

import os
import sys
import time

from infra.errors import BadInput
from infra.launch import Channel


def echo(channel: Channel) -> None:
    """Send back what comes, until "end" comes or nobody is there any more."""
    while not channel.closed:
        for message in channel.receive(60.0):
            if message == "end":
                return
            channel.send(message)


def count_and_return(channel: Channel) -> None:
    for number in range(500):
        channel.send(number)


def raise_bad_input(channel: Channel) -> None:
    channel.send("before")
    raise BadInput("r must be at most 64, got 128; lower it.")


def raise_key_error(channel: Channel) -> None:
    raise KeyError("left\nright")


def send_what_cannot_travel(channel: Channel) -> None:
    try:
        channel.send(lambda: None)
    except Exception as error:
        channel.send(type(error).__name__)
    channel.send("still here")


def change_what_was_sent(channel: Channel) -> None:
    message = ["sent"]
    channel.send(message)
    message.append("changed")


def tell_environment(channel: Channel) -> None:
    """Tell whether torch was loaded before the task, how many threads it takes, and the environment."""
    loaded = "torch" in sys.modules
    import torch

    channel.send({"loaded": loaded, "threads": torch.get_num_threads(), "environment": dict(os.environ)})


def spin(channel: Channel) -> None:
    """Compute in Python for ever, deaf to the channel."""
    channel.send("spinning")
    while True:
        time.perf_counter()
