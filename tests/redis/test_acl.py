"""Users and permissions beside redis-server's: replies byte for byte, but for the order of single commands, which Redis leaves to chance."""

from __future__ import annotations

import pytest

from shmcache.sidecar.commands.table import OURS, SUBCOMMANDS, TABLE, categories_of, family
from shmcache.sidecar.elsewhere import ELSEWHERE
from tests.redis import servers
from tests.redis.resp import Connection, Item, parse

NOT_IN_7_0 = {"client|setinfo"}


@pytest.fixture
def both():
    """(redis-server, shmcache serve)"""
    try:
        with servers.redis_server() as one, servers.shmcache_server() as two:
            yield one[:2], two[:2]
    except servers.Missing as e:
        pytest.skip(str(e))


def in_order(text):
    """A user's rules with single commands sorted: what comes before the categories, and these, as it was."""
    words = text.split(b" ")
    singles = sorted(w for w in words if w[:1] in b"+-" and w[1:2] != b"@")
    return b" ".join([w for w in words if w not in singles] + singles)


def comparable(item):
    if isinstance(item.value, list):
        return Item(item.kind, [comparable(each) for each in item.value])
    return Item(item.kind, in_order(item.value)) if item.kind == b"$" and item.value is not None and b"@all" in item.value else item


def run(where, lines, protocol):
    """Each line by the connection whose number it begins with."""
    connections, found = {}, []
    try:
        for line in lines:
            number, *words = line.split(" ")
            if number not in connections:
                connections[number] = Connection(where, 10.0)
                connections[number].call(b"HELLO", protocol)
            reply = connections[number].call(*(word.encode().replace(b"_", b" ") for word in words))
            item = parse(reply)
            if words[0] == "HELLO" and reply[:1] in b"*%":
                reply, item = reply[:1], None  # there is a number of the connection in it
            found.append((line, reply if item is None else comparable(item[0])))
    finally:
        for connection in connections.values():
            connection.close()
        clean = Connection(where, 10.0)
        for words in (b"ACL DELUSER alice bob", b"ACL SETUSER default reset on nopass +@all ~* &*", b"ACL LOG RESET", b"CONFIG SET requirepass"):
            clean.call(*words.split(b" "), *([b""] if words.endswith(b"requirepass") else []))
        clean.close()
    return found


SEQUENCES = {
    "default": ["1 ACL WHOAMI", "1 ACL LIST", "1 ACL USERS", "1 ACL GETUSER default", "1 ACL GETUSER nobody", "1 ACL CAT"],
    "flags": [
        "1 ACL SETUSER alice", "1 ACL GETUSER alice", "1 ACL SETUSER alice on nopass skip-sanitize-payload", "1 ACL GETUSER alice",
        "1 ACL SETUSER alice off sanitize-payload resetpass", "1 ACL LIST", "1 ACL SETUSER alice reset", "1 ACL LIST",
    ],
    "passwords": [
        "1 ACL SETUSER alice on >one >two >one", "1 ACL GETUSER alice", "2 AUTH alice two", "2 AUTH alice three", "2 AUTH nobody x",
        "1 ACL SETUSER alice <two", "1 ACL SETUSER alice <two", "2 AUTH alice two", "1 ACL SETUSER alice #zz", "1 ACL SETUSER alice !zz",
        "1 ACL SETUSER alice off", "2 AUTH alice one", "1 ACL SETUSER alice on nopass", "2 AUTH alice whatever", "2 AUTH x", "2 AUTH a b c",
        "1 ACL GETUSER alice", "3 HELLO 3 AUTH alice x", "3 HELLO 3 AUTH nobody x", "3 HELLO 2 SETNAME",
    ],
    "keys": [
        "1 ACL SETUSER alice on nopass +@all ~a* %R~r %W~w &*", "1 ACL GETUSER alice", "2 AUTH alice x", "2 SET a1 1", "2 GET a1", "2 GET w",
        "2 SET w 1", "2 SET w 1 GET", "2 GET r", "2 SET r 1", "2 MGET a1 b", "2 COPY r w", "2 COPY w r", "2 RENAME w a1", "2 EXISTS w r b",
        "2 INCR w", "2 BITOP AND w r", "2 BITOP AND r w", "2 BITFIELD r GET u8 0", "2 BITFIELD r SET u8 0 1", "2 OBJECT ENCODING w",
        "2 OBJECT ENCODING b", "2 STRLEN w", "2 GETRANGE w 0 1", "2 SETRANGE w 0 x", "2 APPEND w x", "2 GETDEL w", "2 DEL w r",
        "2 EXPIRE w 10", "2 TTL w", "2 WATCH w", "2 WATCH b", "2 MEMORY USAGE b", "1 ACL SETUSER alice %W~r", "1 ACL GETUSER alice",
        "2 SET r 1", "1 ACL SETUSER alice allkeys ~b", "1 ACL SETUSER alice %Q~b", "1 ACL SETUSER alice ~a_b", "1 ACL SETUSER alice resetkeys",
        "2 GET a1", "1 ACL SETUSER alice %R %RW~b* %wr~x", "1 ACL GETUSER alice", "2 DEL a1 x",
    ],
    "channels": [
        "1 ACL SETUSER alice on nopass +@all &a* &b", "1 ACL GETUSER alice", "1 ACL SETUSER alice resetchannels &c &d &c", "1 ACL LIST",
        "2 AUTH alice x", "2 PUBLISH c x", "2 PUBLISH a x", "1 ACL SETUSER alice allchannels &x", "1 ACL SETUSER alice allchannels",
        "1 ACL GETUSER alice", "2 PUBLISH a x",
    ],
    "subscribers": [
        "1 ACL SETUSER alice on nopass +@all &a* &b", "2 AUTH alice x", "2 SUBSCRIBE a1", "3 AUTH alice x", "3 PSUBSCRIBE b",
        "1 ACL SETUSER alice &c", "2 PING", "3 PING", "1 ACL SETUSER alice resetchannels &b &a1", "2 PING", "3 PING",
        "1 ACL SETUSER alice resetchannels &b* &a1", "2 PING", "3 PING", "4 AUTH alice x", "4 PSUBSCRIBE b*", "4 PSUBSCRIBE a1*",
        "1 ACL SETUSER alice allchannels", "4 PSUBSCRIBE x", "1 ACL SETUSER alice resetchannels &b*", "4 PING", "2 PING",
    ],
    "commands": [
        "1 ACL SETUSER alice on nopass allkeys allchannels +get", "2 AUTH alice x", "2 GET k", "2 SET k v", "2 PING", "2 ACL WHOAMI",
        "2 CONFIG GET maxmemory", "2 CONFIG NOPE", "2 CONFIG GET", "2 GET", "2 NOPE", "1 ACL SETUSER alice +@all -@dangerous", "2 FLUSHALL",
        "2 CONFIG GET save", "2 PING", "1 ACL GETUSER alice", "1 ACL SETUSER alice +config|get", "1 ACL GETUSER alice", "2 CONFIG RESETSTAT",
        "1 ACL SETUSER alice -@all +@read +@write", "1 ACL GETUSER alice", "1 ACL SETUSER alice -@all +select|0 +select|1 +SELECT|0",
        "1 ACL GETUSER alice", "2 SELECT 0", "2 SELECT 1x", "1 ACL SETUSER alice +select", "1 ACL GETUSER alice",
        "1 ACL SETUSER alice -select", "1 ACL GETUSER alice", "1 ACL SETUSER alice +nope", "1 ACL SETUSER alice -nope",
        "1 ACL SETUSER alice +@nope", "1 ACL SETUSER alice -select|0", "1 ACL SETUSER alice +config|get|x", "1 ACL SETUSER alice +config|x",
        "1 ACL SETUSER alice +get|", "1 ACL SETUSER alice +", "1 ACL SETUSER alice what", "1 ACL SETUSER a_b on", "1 ACL SETUSER alice +@all",
        "1 ACL SETUSER alice +@all -config +config|get", "1 ACL GETUSER alice", "1 ACL SETUSER alice nocommands", "1 ACL LIST",
        "1 ACL SETUSER alice +@string +@bitmap -setrange", "1 ACL GETUSER alice", "1 ACL SETUSER alice +@all -@string", "1 ACL GETUSER alice",
    ],
    "dry run": [
        "1 ACL SETUSER alice +@all -@admin ~a* %R~r &ch*", "1 ACL DRYRUN alice GET a", "1 ACL DRYRUN alice GET b", "1 ACL DRYRUN alice SET r 1",
        "1 ACL DRYRUN alice CONFIG GET x", "1 ACL DRYRUN alice CONFIG NOPE x", "1 ACL DRYRUN alice CONFIG", "1 ACL DRYRUN alice GET",
        "1 ACL DRYRUN alice NOPE", "1 ACL DRYRUN nobody GET a", "1 ACL DRYRUN alice PUBLISH chat x", "1 ACL DRYRUN alice PUBLISH x x",
        "1 ACL DRYRUN alice PSUBSCRIBE ch* x*", "1 ACL DRYRUN alice AUTH x", "1 ACL DRYRUN alice", "1 ACL DRYRUN alice MSETNX a 1 b 2",
    ],
    "transactions": [
        "1 ACL SETUSER alice on nopass +@all -@dangerous ~a &*", "2 AUTH alice x", "2 MULTI", "2 SET a 1", "2 SET b 1", "2 EXEC", "2 MULTI",
        "2 SET a 1", "2 GET a", "1 ACL SETUSER alice -set", "2 EXEC", "2 MULTI", "2 GET a", "2 PUBLISH c x",
        "1 ACL SETUSER alice resetkeys ~b resetchannels", "2 EXEC", "2 MULTI", "1 ACL SETUSER alice -exec", "2 EXEC", "2 DISCARD",
    ],
    "default with a password": [
        "1 CONFIG SET requirepass secret", "1 ACL GETUSER default", "1 CONFIG GET requirepass", "2 PING", "2 AUTH secret", "2 PING",
        "2 ACL WHOAMI", "1 ACL SETUSER default off", "3 AUTH secret", "3 PING", "1 ACL SETUSER default on nopass", "3 PING", "3 AUTH x",
        "1 ACL SETUSER default resetpass >x", "1 PING", "3 PING", "3 AUTH default x", "3 PING", "3 RESET", "3 PING",
        "1 ACL SETUSER default nopass",
    ],
    "default may little": [
        "1 ACL SETUSER alice on nopass +@all ~* &*", "1 ACL SETUSER default -@all", "2 PING", "2 HELLO 2 AUTH alice x", "2 PING", "2 RESET",
        "2 PING", "2 AUTH alice x", "2 ACL SETUSER default +@all",
    ],
    "deleting": [
        "1 ACL DELUSER nobody", "1 ACL DELUSER default alice", "1 ACL SETUSER alice on nopass +@all", "1 ACL SETUSER bob", "2 AUTH alice x",
        "2 PING", "1 ACL DELUSER alice bob nobody", "2 PING", "1 ACL USERS", "1 ACL SETUSER alice on nopass +@all", "3 AUTH alice x",
        "3 ACL DELUSER alice", "3 PING", "1 CLIENT KILL USER nobody",
    ],
    "shapes": [
        "1 ACL NOPE", "1 ACL", "1 ACL WHOAMI x", "1 ACL CAT x y", "1 ACL CAT nope", "1 ACL GENPASS 0", "1 ACL GENPASS 4097", "1 ACL GENPASS x",
        "1 ACL GENPASS 1 2", "1 ACL LOAD", "1 ACL SAVE", "1 ACL LOG x", "1 ACL LOG 1 2", "1 ACL LOG", "1 ACL LOG RESET", "1 ACL GETUSER",
    ],
}  # fmt: skip


@pytest.mark.parametrize("protocol", [b"2", b"3"])
def test_users_as_redis_has_them(both, protocol):
    for name, lines in SEQUENCES.items():
        reference, ours = (run(where, lines, protocol) for where in both)
        for expected, found in zip(reference, ours, strict=True):
            assert found == expected, name


def log_of(where):
    """What ACL LOG says after some refusals: without the times and the addresses."""
    one, two = Connection(where, 10.0), Connection(where, 10.0)
    for line in ("ACL LOG RESET", "ACL SETUSER alice on >x +@all -config ~a &a"):
        one.call(*line.encode().split())
    for line in ("AUTH alice y", "AUTH alice x", "CONFIG GET x", "CONFIG GET x", "GET b", "PUBLISH b x", "MULTI", "GET b", "EXEC", "GET c"):
        two.call(*line.encode().split())
    replies = [one.call(b"ACL", b"LOG"), one.call(b"ACL", b"LOG", b"2"), one.call(b"ACL", b"LOG", b"-1")]
    one.call(b"ACL", b"DELUSER", b"alice")
    for connection in (one, two):
        connection.close()
    return [[[field.value for field in entry.value[:10]] for entry in parse(reply)[0].value] for reply in replies]


def test_the_log_of_refusals(both):
    reference, ours = map(log_of, both)
    assert len(reference[0]) == 6
    assert ours == reference


def test_categories_are_those_of_redis(both):
    connection = Connection(both[0], 10.0)
    known = {}

    def add(item):
        name, groups, subcommands = item.value[0].value.decode(), item.value[6].value, item.value[9].value
        known[name] = [group.value.decode() for group in groups]
        for each in subcommands:
            add(each)

    for item in parse(connection.call(b"COMMAND"))[0].value:
        add(item)
    connection.close()
    for name in TABLE:
        for full in family(name):
            if full not in NOT_IN_7_0 | OURS:
                assert ["@" + category for category in categories_of(full)] == known[full], full
    for full in NOT_IN_7_0:
        assert full.partition("|")[2] in SUBCOMMANDS["client"] and full not in known
    assert not OURS & known.keys()


@pytest.mark.parametrize("command", ["ACL CAT", "COMMAND LIST FILTERBY ACLCAT"])
def test_commands_by_category(both, command):
    connections = [Connection(where, 10.0) for where in both]
    ours_all = {item.value.decode() for item in parse(connections[1].call(b"COMMAND", b"LIST"))[0].value}
    for category in (item.value for item in parse(connections[0].call(b"ACL", b"CAT"))[0].value):
        reference, ours = (
            {item.value.decode() for item in parse(c.call(*command.encode().split(), category))[0].value} for c in connections
        )
        assert ours - NOT_IN_7_0 - OURS == reference & ours_all, category
    for connection in connections:
        connection.close()


def test_rules_may_name_whatever_redis_has():
    try:
        with servers.redis_server() as where:
            client = Connection(where[:2], 20.0)
            infos = parse(client.call(b"COMMAND"))[0].value
            client.close()
    except servers.Missing as e:
        pytest.skip(str(e))
    theirs = {info.value[0].value.decode() for info in infos} | {sub.value[0].value.decode() for info in infos for sub in info.value[9].value}
    assert theirs - set(ELSEWHERE) == {full for name in TABLE for full in family(name)} - set(OURS) - NOT_IN_7_0
    assert theirs >= ELSEWHERE
