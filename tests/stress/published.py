"""Is a message lost that was published after an acknowledged subscription? Subscriber and publisher are connections of different event loops.

    python -m tests.stress.published --workers 2 --rounds 10000
    python -m tests.stress.published --workers 3 --rounds 10000 --busy 3 --stop-every 50 --kill-every 500

A round: one event loop's client subscribes (SUBSCRIBE, PSUBSCRIBE, in RESP2 or RESP3, alone, in a pipeline, in a transaction); once it is
acknowledged a client of another publishes (a command alone, in a transaction, in a script). PUBLISH, NUMSUB, NUMPAT and CHANNELS have to count one subscriber, and the message has to
arrive, behind the acknowledgement. Once the end of the subscription is acknowledged they have to count none. In every tenth round the same of
MONITOR: the next command of the other loop has to be shown. Which loop a connection has says INFO's process_id. --busy: so many processes keep every loop
busy: pipelines, subscriptions, messages. --stop-every: in every such round the publisher's loop is stopped (SIGSTOP) while the client subscribes
and the message is sent to it. --kill-every: in every such round the publisher's loop is killed after the acknowledgement, and the
message is the first that its successor is sent. Prints JSON; exit code 1: something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.redis.resp import CLOSED, SILENT, Connection, Item, encode, parse
from tests.redis.servers import shmcache_server

LIMIT = 60.0  # seconds, of any wait
fork = mp.get_context("fork")
MONITOR_EVERY = 10  # rounds
HOWS = ("alone", "pipeline", "transaction")
PUBLISH_HOWS = ("alone", "transaction", *(["script"] if importlib.util.find_spec("lupa") else []))


def loop_of(connection: Connection) -> int:
    """The pid of its event loop; 0: it was closed."""
    info = connection.call(b"INFO", b"server")
    return 0 if CLOSED in info else int(info.partition(b"process_id:")[2].split(b"\r\n")[0])


class Loops:
    """Connections of each event loop of a server, by its pid."""

    def __init__(self, port: int, n: int) -> None:
        self.port, self.n = port, n
        self.idle: dict[int, list[Connection]] = {}
        self.refill()

    def refill(self) -> None:
        """Until there are some of every loop, and none of one that has ended."""
        deadline = time.monotonic() + LIMIT
        while True:
            self.idle = {pid: there for pid, there in self.idle.items() if os.path.exists(f"/proc/{pid}") and there}
            if len(self.idle) == self.n and all(len(there) >= 2 for there in self.idle.values()):
                return
            assert time.monotonic() < deadline, f"no connections of {self.n} event loops within {LIMIT} s"
            with contextlib.suppress(OSError):
                connection = Connection(("127.0.0.1", self.port), LIMIT)
                pid = loop_of(connection)
                if pid and len(self.idle.setdefault(pid, [])) < 2:
                    self.idle[pid].append(connection)
                else:
                    connection.close()

    def first_of_another(self, pids: set[int]) -> tuple[int, Connection]:
        """A connection of an event loop that is none of these, as soon as there is one; it was asked nothing but who it is."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                connection = Connection(("127.0.0.1", self.port), LIMIT)
                pid = loop_of(connection)
                if pid and pid not in pids:
                    return pid, connection
                connection.close()
        raise AssertionError(f"no other event loop within {LIMIT} s")


def keep_busy(port: int, n: int, seed: int) -> None:
    """Until killed."""
    rng = random.Random(seed)
    while True:
        with contextlib.suppress(OSError, AssertionError, IndexError):
            connections = [there[0] for there in Loops(port, n).idle.values()]
            while all(connection.open for connection in connections):
                for connection in connections:
                    key, channel = b"key:%d" % rng.randrange(1000), b"noise:%d" % rng.randrange(20)
                    connection.send(b"".join([encode((b"SET", key, b"x" * rng.randrange(4000))), encode((b"GET", key))] * 30))
                    connection.send(encode((b"PUBLISH", channel, b"x" * rng.randrange(2000))))
                for connection in connections:
                    for _ in range(61):
                        connection.reply()
                listener = rng.choice(connections)
                listener.send(encode((b"HELLO", b"3")) + encode((b"SUBSCRIBE", channel)) + encode((b"UNSUBSCRIBE", channel)))
                while b"unsubscribe" not in listener.reply():
                    pass


class Round:
    """One subscription, and what is wrong with it. pids: of the subscriber's and of the publisher's event loop."""

    def __init__(self, loops: Loops, number: int, rng: random.Random, publisher_is: str = "running") -> None:
        self.loops, self.number = loops, number
        self.pids = rng.sample(sorted(loops.idle), 2)
        self.listener, self.publisher = (loops.idle[pid][i] for i, pid in enumerate(self.pids))
        self.kind, self.how, self.publish_how = rng.choice((b"SUBSCRIBE", b"PSUBSCRIBE")), rng.choice(HOWS), rng.choice(PUBLISH_HOWS)
        self.protocol = rng.choice((b"2", b"3"))
        self.channel = b"channel:%d" % number
        self.name = self.channel if self.kind == b"SUBSCRIBE" else self.channel + b"*"
        self.publisher_is = publisher_is
        self.wrong: list[str] = []

    def expect(self, what: str, got: object, wanted: object) -> None:
        if got != wanted:
            kind = f"{self.kind.decode()} {self.how} RESP{self.protocol.decode()}, PUBLISH {self.publish_how}, its loop {self.publisher_is}"
            self.wrong.append(f"round {self.number} ({kind}): {what}: {got!r}, not {wanted!r}")

    def listen(self) -> None:
        """Subscribe, and read up to the acknowledgement."""
        subscribe = encode((self.kind, self.name))
        if self.how == "transaction":
            self.listener.send(encode((b"MULTI",)) + subscribe + encode((b"EXEC",)))
            for _ in range(2):
                self.listener.reply()
        else:
            more = encode((b"SUBSCRIBE", b"other")) + encode((b"PING",)) if self.how == "pipeline" else b""
            self.listener.send(subscribe + more)
        self.expect("acknowledged", self.name in self.listener.reply(), True)
        if self.how == "pipeline":
            self.expect("acknowledged, too", b"other" in self.listener.reply(), True)
            self.expect("PING's reply", b"PONG" in self.listener.reply().upper(), True)

    def count(self, there: int) -> None:
        """What the publisher's loop knows of the subscription."""
        channels, patterns = (there, 0) if self.kind == b"SUBSCRIBE" else (0, there)
        asked = ((b"NUMSUB", self.channel), (b"CHANNELS", self.channel), (b"NUMPAT",))
        self.publisher.send(b"".join(encode((b"PUBSUB", *words)) for words in asked))
        found = [taken_apart(self.publisher.reply()) for _ in asked]
        self.expect("NUMSUB", int(found[0].value[1].value), channels)
        self.expect("CHANNELS", [item.value for item in found[1].value], [self.channel] * channels)
        self.expect("NUMPAT", int(found[2].value), patterns)

    def publish(self) -> None:
        words = (b"PUBLISH", self.channel, b"message %d" % self.number)
        if self.publish_how == "script":
            self.publisher.send(encode((b"EVAL", b"return redis.call(unpack(ARGV))", b"0", *words)))
        elif self.publish_how == "transaction":
            self.publisher.send(encode((b"MULTI",)) + encode(words) + encode((b"EXEC",)))
        else:
            self.publisher.send(encode(words))

    def published(self) -> object:
        """To how many, as PUBLISH says."""
        replies = [taken_apart(self.publisher.reply()) for _ in range(3 if self.publish_how == "transaction" else 1)]
        return replies[-1].value[0].value if self.publish_how == "transaction" else replies[-1].value

    def run(self) -> list[str]:
        self.listener.call(b"HELLO", self.protocol)
        if self.publisher_is == "stopped":
            os.kill(self.pids[1], signal.SIGSTOP)
            try:
                self.listen()
                self.publish()
            finally:
                os.kill(self.pids[1], signal.SIGCONT)
        else:
            self.listen()
            if self.publisher_is == "killed":
                before = set(self.loops.idle)
                os.kill(self.pids[1], signal.SIGKILL)
                _, self.publisher = self.loops.first_of_another(before)
            self.publish()
        n = self.published()
        self.expect("PUBLISH", n, b"1")
        if n == b"1":
            self.expect("the message arrived", b"message %d" % self.number in self.listener.reply(), True)
        self.count(1)
        end = b"UNSUBSCRIBE" if self.kind == b"SUBSCRIBE" else b"PUNSUBSCRIBE"
        self.listener.call(end, self.name)
        self.publish()
        self.expect("PUBLISH after the end", self.published(), b"0")
        self.count(0)
        if self.how == "pipeline":
            self.listener.call(b"UNSUBSCRIBE", b"other")
        return self.wrong

    def monitor(self) -> None:
        """The listener is a monitor's connection afterwards."""
        self.expect("MONITOR", self.listener.call(b"MONITOR"), b"+OK\r\n")
        seen, later = b"seen:%d" % self.number, b"later:%d" % self.number
        self.publisher.call(b"GET", seen)
        self.listener.socket.settimeout(0.2)
        deadline = time.monotonic() + LIMIT
        while seen not in (line := self.listener.reply()):
            if line == SILENT:
                self.publisher.call(b"GET", later)
            if later in line or not self.listener.open or time.monotonic() > deadline:
                self.expect("what a monitor was shown first", line, seen)
                return


def taken_apart(reply: bytes) -> Item:
    found = parse(reply)
    assert found is not None
    return found[0]


@contextlib.contextmanager
def busy(port: int, workers: int, n: int, seed: int) -> Iterator[None]:
    processes = [fork.Process(target=keep_busy, args=(port, workers, 1000 * seed + i), daemon=True) for i in range(n)]
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(port: int, workers: int, rounds: int, seed: int = 1, busy_processes: int = 0, stop_every: int = 0, kill_every: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)
    wrong: list[str] = []
    began = time.monotonic()
    with busy(port, workers, busy_processes, seed):
        loops = Loops(port, workers)
        for number in range(1, rounds + 1):
            how = "killed" if kill_every and number % kill_every == 0 else "stopped" if stop_every and number % stop_every == 0 else "running"
            each = Round(loops, number, rng, how)
            wrong += each.run()
            if number % MONITOR_EVERY == 0:
                each.monitor()
                each.listener.close()
                loops.idle[each.pids[0]].remove(each.listener)
            if how == "killed":
                each.publisher.close()
            if how == "killed" or number % MONITOR_EVERY == 0:
                loops.refill()
    return {"workers": workers, "rounds": rounds, "seconds": round(time.monotonic() - began, 1), "wrong": len(wrong), "first": wrong[:5]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--busy", type=int, default=2, metavar="N", help="processes that keep the event loops busy (2)")
    parser.add_argument("--stop-every", type=int, default=100, metavar="N", help="rounds; 0: never (100)")
    parser.add_argument("--kill-every", type=int, default=1000, metavar="N", help="rounds; 0: never (1000)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with shmcache_server("--workers", str(args.workers)) as (_, port, _pid):
        result = run(port, args.workers, args.rounds, args.seed, args.busy, args.stop_every, args.kill_every)
    print(json.dumps({"seed": args.seed, **result}))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
