"""Commands that concern all event loops of one `shmcache serve`: a part of them runs in each.

    everywhere(client, part, arguments, finish)    the reply is finish([what part(server, *arguments) returned here, there, ...])

The others are asked over the bus (bus.py), and the client is answered when they have answered, or ANSWER_LIMIT later with what there is:
its loop goes on meanwhile. Within EXEC, which holds locks, the others do their part, too, but nobody waits: the reply is of this process
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection, Server

    Finish = Callable[[list[Any]], bytes]

PARTS: dict[str, Callable[..., Any]] = {}


def part(run: Callable[..., Any]) -> Callable[..., Any]:
    """run(server, *arguments) -> result, all of it what msgpack takes."""
    PARTS[run.__name__] = run
    return run


@part
def heard(server: Server) -> None:
    """For what is told in another way, before: frames of one process come in order."""


def everywhere(client: Connection, run: Callable[..., Any], arguments: list[Any], finish: Finish) -> bytes | None:
    server = client.server
    mine = run(server, *arguments)
    if not server.link.others:
        return finish([mine])
    if client.ex.holds or client.ex is not server.executor:
        server.link.ask(run.__name__, arguments, lambda answers: None)
        return finish([mine])

    def answer(answers: list[Any]) -> None:
        if not client.lost:
            client.conclude(finish, [mine, *answers])
            server.go_on(client)

    client.blocked = True
    server.link.ask(run.__name__, arguments, answer)
    return None
