"""The process that serves metrics: python -m shmcache.sidecar.metrics NAME NUMBER, started as a worker is.

It has a handle of the segment for its figures, and asks the workers for theirs (bus.py) at each scrape. The parent holds the listening
sockets, so that nobody is refused while it is started again. HTTP, text formats and compression are prometheus_client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shmcache import cache as cache_module
from shmcache import metrics, notices
from shmcache.metrics import Metric
from shmcache.sidecar.bus import ANSWER_LIMIT, Member

PER_WORKER = (  # name, kind, text, key of commands/info.py's state
    ("connections", "gauge", "Connected clients.", "clients"),
    ("connections_accepted_total", "counter", "Connections accepted.", "accepted"),
    ("connections_rejected_total", "counter", "Connections over maxclients.", "refused"),
    ("net_input_bytes_total", "counter", "Bytes read from clients.", "bytes_in"),
    ("net_output_bytes_total", "counter", "Bytes sent to clients.", "bytes_out"),
    ("client_buffer_bytes", "gauge", "Bytes of the clients' buffers.", "buffer_bytes"),
    ("event_loop_lag_seconds", "gauge", "How late the event loop's last tick came.", "lag_s"),
    ("event_loop_worst_lag_seconds", "gauge", "How late one came at worst.", "worst_lag_s"),
    ("pool_commands", "gauge", "Commands that threads run beside the event loop, or that wait for one.", "in_pool"),
    ("replies_waiting", "gauge", "Clients whose replies wait for the disk.", "waiting"),
    ("worker_start_time_seconds", "gauge", "When the event loop began, unix time.", "began"),
)
PER_COMMAND = (
    ("commands_total", "Commands executed.", 1),
    ("command_seconds_total", "Time in which they were executed.", 1e-9),
    ("commands_rejected_total", "Commands refused before they ran.", 1),
    ("commands_failed_total", "Commands answered with an error.", 1),
)


def of_workers(name: str, states: list[dict[str, Any]], workers: int) -> Iterator[Metric]:
    """Of the event loops that have answered; workers: how many there are to be."""
    labels = {s["worker"]: {"segment": name, "worker": str(s["worker"])} for s in states}
    up = [({"segment": name, "worker": str(i)}, int(i in labels)) for i in range(workers)]
    yield Metric("worker_up", "gauge", "Does this event loop answer?", list(up))
    for metric, kind, text, key in PER_WORKER:
        yield Metric(metric, kind, text, [(labels[s["worker"]], s[key]) for s in states])
    for i, (metric, text, unit) in enumerate(PER_COMMAND):
        rows = [(s, command, row) for s in states for command, row in s["by_command"].items()]
        yield Metric(metric, "counter", text, [({**labels[s["worker"]], "command": command}, row[i] * unit) for s, command, row in rows])
    errors = [({**labels[s["worker"]], "error": word.decode("latin-1")}, n) for s in states for word, n in s["errors"].items()]
    yield Metric("error_replies_total", "counter", "Error replies, by their first word.", list(errors))
    modes = [({**labels[s["worker"]], "mode": mode}, s[mode + "_s"]) for s in states for mode in ("user", "system")]
    yield Metric("cpu_seconds_total", "counter", "CPU time of the event loop's process.", modes)


class Families(Collector):
    """Metrics as prometheus_client takes them."""

    def __init__(self, look: Callable[[], Iterable[Metric]]) -> None:
        self.look = look

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for name, kind, text, values in self.look():
            labels = list(values[0][0]) if values else []
            family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(f"shmcache_{name}", text, labels=labels)
            for words, value in values:
                family.add_metric([words[label] for label in labels], value)
            yield family


class Handler(MetricsHandler):
    timeout = 10.0  # seconds that a client may be silent

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/metrics":
            super().do_GET()
        else:
            self.send_error(404, explain="the metrics are at /metrics")


async def states_of(member: Member) -> list[dict[str, Any]]:
    answered: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
    member.ask("state", [], answered.set_result)
    return sorted(await answered, key=lambda state: int(state["worker"]))


async def serve(options: dict[str, Any]) -> None:
    """Serve till SIGTERM or SIGINT, or till the process that started this one has ended."""
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    member = Member(options["number"], end.set)
    await loop.create_connection(lambda: member, sock=socket.socket(fileno=options["link"]))
    with cache_module.attach(options["name"]) as cache:

        def look() -> Iterator[Metric]:
            states = asyncio.run_coroutine_threadsafe(states_of(member), loop).result(2 * ANSWER_LIMIT)
            yield from metrics.of_segment(cache.stats())
            yield from of_workers(cache.name, states, options["workers"])

        registry = CollectorRegistry(auto_describe=False)
        registry.register(Families(look))
        servers = [http_server(fd, registry) for fd in options["sockets"]]
        for server in servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # nobody waits for one that was started again
            os.write(options["ready_fd"], b"r")
        os.close(options["ready_fd"])
        await end.wait()
        await asyncio.to_thread(stop, servers)


def http_server(fd: int, registry: CollectorRegistry) -> ThreadingHTTPServer:
    """On a listening socket."""
    server = ThreadingHTTPServer(("", 0), Handler.factory(registry), bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=fd)
    server.daemon_threads = True
    return server


def stop(servers: list[ThreadingHTTPServer]) -> None:
    for server in servers:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    notices.never_wait()
    asyncio.run(serve(json.load(sys.stdin)))
