"""LEASE.GET, LEASE.FILL, LEASE.RELEASE: for clients that fill by hand what they miss (Cache.get_lease, and fill). Redis has none of them.

    LEASE.GET key [seconds]                          [value, nil]; [nil, token]: fill it; [nil, nil]: another does. It writes: the claim
    LEASE.FILL key token value [EX s | PX ms]        1, or 0: somebody has set, deleted or cleared the key since, or the seconds are over
    LEASE.RELEASE key token                          1, or 0

A token is a claim's version: a number, or from 2^53 on, which the numbers of some clients do not tell apart, its digits. A claim is its
process's: with several event loops it is filled over a connection to the same one (best: the connection that was given it), else the answer
is 0. In front of a store a lease is given for what that has not got either, and who reads the key meanwhile waits for it, up to the
policy's timeout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmcache.sidecar.commands.table import ONE, SYNTAX, WRITE, Error, command, in_pool, integer_of
from shmcache.sidecar.replies import array, bulk, integer, nil

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection

SECONDS = 10  # that a lease stands, unless its taker says otherwise
MOST_SECONDS = 300  # for it is not given back when the client goes
TRIES = 16
MOST_NUMBER = 1 << 53


@command("lease.get", -2, WRITE, ONE)
def lease_get(client: Connection, arguments: list[bytes]) -> bytes:
    if len(arguments) > 2:
        raise Error(SYNTAX)
    seconds = integer_of(arguments[1]) if len(arguments) == 2 else SECONDS
    if not 0 < seconds <= MOST_SECONDS:
        raise Error(f"ERR a lease stands for 1 to {MOST_SECONDS} seconds")
    ex, none = client.ex, nil(client.protocol)
    name = ex.name_of(arguments[0])
    for _ in range(TRIES):
        found = ex.read(arguments[0])
        if found is not None:
            return array((bulk(found[0]), none))
        token = ex.table.claim(name, seconds)
        if token:
            return array((none, none if token <= 0 else integer(token) if token < MOST_NUMBER else bulk(b"%d" % token)))
    return array((none, none))  # each time a value was there when it was claimed, and gone when it was read


@command("lease.fill", -4, WRITE, ONE)
def lease_fill(client: Connection, arguments: list[bytes]) -> bytes:
    ttl = None
    if len(arguments) == 5 and (unit := arguments[3].lower()) in (b"ex", b"px"):
        n = integer_of(arguments[4])
        ttl = n if unit == b"ex" else n / 1000
        if not 0 < ttl < 1e12:
            raise Error("ERR invalid expire time in 'lease.fill' command")
    elif len(arguments) != 3:
        raise Error(SYNTAX)
    token = integer_of(arguments[1])
    name = client.ex.name_of(arguments[0])
    return integer(token > 0 and client.ex.table.fill_claim(name, arguments[2], token, ttl))


@command("lease.release", 3, WRITE, ONE)
def lease_release(client: Connection, arguments: list[bytes]) -> bytes:
    token = integer_of(arguments[1])
    in_pool(client)
    return integer(token > 0 and client.ex.table.unclaim(client.ex.name_of(arguments[0]), token))
