"""Does a server answer as Redis does? Random sequences of commands go to both; replies are compared byte for byte.

    python -m tests.redis.transcript --sequences 3000 --seed 7                   `shmcache serve` and redis-server are started
    python -m tests.redis.transcript --ours 127.0.0.1:7777 --reference redis     ours runs already (a path: its Unix socket)
    python -m tests.redis.transcript --only strings,integers --protocol 2        groups of commands
    python -m tests.redis.transcript --seed 7 --first 1234 --sequences 1         one of them again

Both servers are emptied (FLUSHALL) before each sequence: give it none whose data anybody needs. A sequence ends at its first
difference, as what follows may follow from it; those that are printed are shortened first. Where time or chance decides, not bytes are
compared, but:

    TTL PTTL EXPIRETIME PEXPIRETIME OBJECT|IDLETIME   times of 0 and more by value, within 2 s (OBJECT|IDLETIME: an hour; that of a small int, which is shared, is old)
    KEYS; SCAN from cursor 0 till 0                   the set of keys; SCAN in a transaction: that it is a cursor and keys
    RANDOMKEY OBJECT|FREQ DUMP TIME CLIENT|ID         null or not, and the type of the reply; errors by bytes
    HELLO                                             all but the values of id and version
    DBSIZE                                            after commands that leave keys whose time is over: within as many
    OBJECT|ENCODING OBJECT|REFCOUNT                   what in Redis depends on how a value came to be: embstr or raw, int or a number's text
    OBJECT|HELP                                       that it is an array
    DUMP, then RESTORE                                each server restores its own; its value and time are compared

In the reply of EXEC the same holds for each command. CLIENT SETINFO is of Redis 7.2, and not generated. Exit code 0: no difference; 1: some; 77: this machine has no redis-server.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections import Counter
from typing import Any

from tests.redis import servers
from tests.redis.grammar import DUMPED, GROUPS, Command, Grammar, Sequence, Step, c, name
from tests.redis.resp import CLOSED, SILENT, Connection, Item, encode, parse

TIMES = {"TTL": 2, "EXPIRETIME": 2, "PTTL": 2000, "PEXPIRETIME": 2000, "OBJECT IDLETIME": 3600}  # and how far apart they may be
KIND_ONLY = {"OBJECT HELP", "OBJECT REFCOUNT", "RANDOMKEY", "OBJECT FREQ", "DUMP", "TIME", "CLIENT ID"}
SILENCES = 20  # so many replies that did not come, and the run ends


class Side:
    """One of the two servers, during a sequence: connections are opened when they are needed, and again when they were closed."""

    def __init__(self, where: tuple[str, int], timeout: float, protocol: int) -> None:
        self.where, self.timeout, self.protocol = where, timeout, protocol
        self.connections: list[Connection | None] = [None, None]
        self.dumped = b""

    def connection(self, number: int) -> Connection:
        found = self.connections[number]
        if found is None or not found.open:
            self.close(number)
            found = self.connections[number] = Connection(self.where, self.timeout)
            if self.protocol == 3:
                found.call(b"HELLO", b"3")
        return found

    def send(self, step: Step) -> None:
        if any(DUMPED in command for command in step.commands):
            commands = tuple(tuple(self.dumped if a == DUMPED else a for a in command) for command in step.commands)
            step = dataclasses.replace(step, commands=commands)
        self.connection(step.connection).send(step.data(), step.pieces)

    def replies(self, step: Step) -> list[bytes]:
        connection = self.connection(step.connection)
        if step.closes:
            return [connection.rest()]
        if step.loop:
            return self.scan(connection, step.commands[0])
        found = [connection.reply() for _ in range(len(step.commands) if step.replies is None else step.replies)]
        if step.label == "DUMP":
            item = taken_apart(found[0])
            self.dumped = item.value if item and item.kind == b"$" and item.value else b""
        return found

    def scan(self, connection: Connection, command: Command) -> list[bytes]:
        """All keys, each once, in order; a reply that is no cursor and keys as it is."""
        keys: set[bytes] = set()
        for _ in range(10_000):
            raw = connection.reply()
            item = taken_apart(raw)
            if item is None or item.kind != b"*" or not item.value or len(item.value) != 2 or item.value[1].kind != b"*":
                return [raw]
            keys.update(key.value for key in item.value[1].value)
            if item.value[0].value == b"0":
                return [encode(sorted(keys))]
            connection.send(encode((command[0], item.value[0].value, *command[2:])))
        return [b"<a cursor without end>"]

    def close(self, number: int) -> None:
        found, self.connections[number] = self.connections[number], None
        if found is not None:
            found.close()


def taken_apart(raw: bytes) -> Item | None:
    try:
        found = parse(raw)
    except ValueError:
        return None
    return found[0] if found is not None and found[1] == len(raw) else None


def alike(command: Command, ours: Item, reference: Item, expiring: int) -> bool:
    """Are these what the command may say, where bytes need not be equal?"""
    what = name(command)
    if ours.kind != reference.kind or (ours.value is None) != (reference.value is None):
        return False
    if ours == reference or ours.value is None:
        return True
    if ours.kind == b"-":
        return False
    if what in KIND_ONLY:
        return what != "TIME" or len(ours.value) == len(reference.value)
    if what == "OBJECT ENCODING":
        return ours.value == b"int" or {ours.value, reference.value} == {b"embstr", b"raw"}
    if what in TIMES or what == "DBSIZE":
        a, b = int(ours.value), int(reference.value)
        return min(a, b) >= 0 and abs(a - b) <= TIMES.get(what, expiring)
    if what == "KEYS":
        return sorted(i.value for i in ours.value) == sorted(i.value for i in reference.value)
    if what == "SCAN":
        return len(ours.value) == 2 and ours.value[1].kind == reference.value[1].kind
    if what == "HELLO":
        return len(ours.value) == len(reference.value) and all(
            a == b or (i % 2 and ours.value[i - 1].value in (b"id", b"version") and a.kind == b.kind)
            for i, (a, b) in enumerate(zip(ours.value, reference.value, strict=True))
        )
    return False


@dataclasses.dataclass
class Difference:
    sequence: Sequence
    steps: list[Step]  # those that ran, with the one that differed last
    command: str
    ours: bytes
    reference: bytes

    def text(self, seed: int) -> str:
        lines = [f"seed {seed}, sequence {self.sequence.number}, RESP{self.sequence.protocol}: {self.command}"]
        lines += [f"  {step}" for step in self.steps]
        return "\n".join([*lines, f"  ours:      {self.ours[:2000]!r}", f"  reference: {self.reference[:2000]!r}"])


class Comparison:
    def __init__(self, ours: tuple[str, int], reference: tuple[str, int], groups: set[str], seed: int, timeout: float = 5.0) -> None:
        self.where, self.groups, self.seed, self.timeout = (ours, reference), groups, seed, timeout
        self.control = [Connection(where, timeout) for where in self.where]
        self.compared: Counter[str] = Counter()
        self.different: Counter[str] = Counter()
        self.silences = 0

    def make(self, number: int, protocol: int) -> Sequence:
        return Grammar(self.seed, number, self.groups, protocol).make()

    def run(self, sequence: Sequence, steps: list[Step], count: bool = True) -> Difference | None:
        """Send these steps of a sequence to both; the first difference."""
        for i, where in enumerate(self.where):
            if not self.control[i].open:
                self.control[i].close()
                self.control[i] = Connection(where, self.timeout)
            if self.control[i].call(b"FLUSHALL") == CLOSED:  # it was closed since then
                self.control[i] = Connection(where, self.timeout)
                self.control[i].call(b"FLUSHALL")
        sides = [Side(where, self.timeout, sequence.protocol) for where in self.where]
        queued: list[list[Command]] = [[], []]
        used = sorted({step.connection for step in steps})
        try:
            for i, step in enumerate([*steps, *(Step(n, (c("ECHO", "nothing is left over"),)) for n in used)]):
                for side in sides:
                    side.send(step)
                ours, reference = (side.replies(step) for side in sides)
                if step.pause:
                    time.sleep(step.pause)
                if count:
                    self.compared.update([step.label] if step.raw is not None else [name(command) for command in step.commands])
                different = self.compare(step, ours, reference, queued[step.connection], sequence.expiring)
                if different is not None:
                    self.silences += count and different[1].endswith(SILENT)
                    return Difference(sequence, [*steps, step][: i + 1] if i < len(steps) else [*steps, step], *different)
                if step.closes:
                    for side in sides:
                        side.close(step.connection)
                    queued[step.connection] = []
        finally:
            for side in sides:
                for number in (0, 1):
                    side.close(number)
        return None

    def compare(
        self, step: Step, ours: list[bytes], reference: list[bytes], queue: list[Command], expiring: int
    ) -> tuple[str, bytes, bytes] | None:
        """What differs, and both; keeps the queue of the connection's transaction."""
        if reference and reference[-1].endswith(SILENT):  # then the grammar is wrong, or --timeout is short
            return step.label, b"".join(ours), b"".join(reference)
        if step.raw is not None or step.loop or step.closes:
            return None if ours == reference else (step.label, b"".join(ours), b"".join(reference))
        for command, a, b in zip(step.commands, ours, reference, strict=True):
            what = name(command)
            replies = queue if what == "EXEC" else None
            if a != b and not self.same(command, a, b, replies, expiring):
                return self.blamed(what, a, b, replies, expiring), a, b
            if b == b"+QUEUED\r\n":
                queue.append(command)
            elif what in ("EXEC", "DISCARD", "RESET"):
                queue.clear()
        return None

    def same(self, command: Command, a: bytes, b: bytes, queue: list[Command] | None, expiring: int) -> bool:
        x, y = taken_apart(a), taken_apart(b)
        if x is None or y is None or x.kind != y.kind:
            return False
        if queue is None:
            return alike(command, x, y, expiring)
        if x.kind != b"*" or not x.value or not y.value or not len(x.value) == len(y.value) == len(queue):
            return False
        return all(alike(q, i, j, expiring) for q, i, j in zip(queue, x.value, y.value, strict=True))

    def blamed(self, what: str, a: bytes, b: bytes, queue: list[Command] | None, expiring: int) -> str:
        """The command that differs: in the reply of EXEC the first that does."""
        x, y = taken_apart(a), taken_apart(b)
        if queue and x and y and x.kind == y.kind == b"*" and x.value and y.value and len(x.value) == len(y.value) == len(queue):
            return "EXEC: " + next(name(q) for q, i, j in zip(queue, x.value, y.value, strict=True) if not alike(q, i, j, expiring))
        return what

    def shrunk(self, found: Difference, tries: int = 80, seconds: float = 3.0) -> Difference:
        """Leave out what is not needed for a difference of the same command, as far as that goes in so many tries and seconds."""
        deadline = time.monotonic() + seconds
        size = max(1, len(found.steps) // 2)
        at = 0
        while tries > 0 and time.monotonic() < deadline:
            if at >= len(found.steps) - 1:
                if size == 1:
                    break
                size, at = size // 2, 0
                continue
            fewer = found.steps[:at] + found.steps[min(at + size, len(found.steps) - 1) :]
            tries -= 1
            again = self.run(found.sequence, fewer, count=False)
            if again is not None and again.command == found.command:
                found = again
            else:
                at += size
        return found

    def close(self) -> None:
        for connection in self.control:
            connection.close()


def chosen(only: str | None, skip: str | None) -> set[str]:
    """Raises: ValueError for a group that there is not."""
    wanted = set(only.split(",")) if only else set(GROUPS)
    left_out = set(skip.split(",")) if skip else set()
    if unknown := (wanted | left_out) - set(GROUPS):
        raise ValueError(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    return wanted - left_out


def compare(args: argparse.Namespace, ours: tuple[str, int], reference: tuple[str, int]) -> tuple[dict[str, Any], bool]:
    comparison = Comparison(ours, reference, args.groups, args.seed, args.timeout)
    began = time.monotonic()
    shown: Counter[str] = Counter()
    texts: list[str] = []
    number = args.first
    why = "all"
    try:
        for number in range(args.first, args.first + args.sequences):
            if time.monotonic() - began > args.seconds:
                why = "time"
                break
            if comparison.silences >= SILENCES:
                why = "no replies"
                break
            protocol = {"2": 2, "3": 3, "both": 2 + number % 2}[args.protocol]
            sequence = comparison.make(number, protocol)
            found = comparison.run(sequence, sequence.steps)
            if found is None:
                continue
            comparison.different[found.command] += 1
            if len(texts) < args.report and shown[found.command] < args.each:
                shown[found.command] += 1
                texts.append((comparison.shrunk(found) if found.ours[-len(SILENT) :] != SILENT else found).text(args.seed))
                if not args.json:
                    print(texts[-1] + "\n", flush=True)
        else:
            number += 1
    finally:
        comparison.close()
    report = {
        "seed": args.seed,
        "protocol": args.protocol,
        "groups": sorted(args.groups),
        "sequences": number - args.first,
        "ended": why,
        "commands": comparison.compared.total(),
        "compared": dict(comparison.compared.most_common()),
        "sequences_with_differences": comparison.different.total(),
        "differences": dict(comparison.different.most_common()),
        "shown": texts,
        "seconds": round(time.monotonic() - began, 1),
    }
    return report, not comparison.different and why == "all"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ours", help="HOST:PORT, a path, or redis; else `shmcache serve` is started")
    made.add_argument("--reference", help="HOST:PORT or a path; else redis-server is started")
    made.add_argument("--databases", default="16", help="of the servers that are started (16)")
    made.add_argument("--sequences", type=int, default=3000)
    made.add_argument("--first", type=int, default=0, help="number of the first sequence (0)")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--protocol", choices=("2", "3", "both"), default="both", help="RESP2, RESP3, or in turns (both)")
    made.add_argument("--only", help="groups: " + ",".join(GROUPS))
    made.add_argument("--skip", help="groups that are left out")
    made.add_argument("--report", type=int, default=10, help="differences that are printed (10)")
    made.add_argument("--each", type=int, default=2, help="of these at most so many of one command (2)")
    made.add_argument("--timeout", type=float, default=5.0, help="seconds to wait for a reply, or for the end of a connection (5)")
    made.add_argument("--seconds", type=float, default=600, help="end after so long (600)")
    made.add_argument("--json", action="store_true")
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    try:
        args.groups = chosen(args.only, args.skip)
    except ValueError as e:
        arguments.error(str(e))
    try:
        with contextlib.ExitStack() as stack:
            start = lambda: servers.redis_server("--databases", args.databases)  # noqa: E731
            reference = stack.enter_context(servers.given_or_started(args.reference, start))
            start_ours = lambda: servers.shmcache_server("--databases", args.databases)  # noqa: E731
            ours = stack.enter_context(servers.given_or_started(args.ours, start_ours))
            report, good = compare(args, ours, reference)
    except servers.Missing as e:
        print(e, file=sys.stderr)
        return 77
    except (servers.Failed, OSError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{report['sequences']} sequences, {report['commands']} commands compared in {report['seconds']} s (seed {args.seed})")
        if report["ended"] != "all":
            print(f"ended early: {report['ended']}")
        for command, n in report["differences"].items():
            print(f"  {n:6} sequences differ first at {command}")
        print("no difference" if good else "DIFFERENT" if report["differences"] else "NOT DONE")
    return 0 if good else 1


if __name__ == "__main__":
    servers.end_on_sigterm()
    sys.exit(main())
