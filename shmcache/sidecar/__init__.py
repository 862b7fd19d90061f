"""The segment over the Redis protocol: for programs on this host that are not Python, and for tools that speak to Redis.

serving(name, ...) serves one from within a program or a test; `shmcache serve` is the service.

core/_resp.pyx  parses the protocol, and executes on the segment what is called often
acl.py          users, what each may do, files of them
server.py       Connection, Server: one event loop and its pool of threads
backed.py       what commands need of the store, if the segment stands before one
undeclared.py   what scripts touch besides their KEYS
commands/       the other commands
worker.py       one process with one Server
serve.py        `shmcache serve`: the supervisor and so many workers, started again when they die
bus.py          between the processes: publish, subscribe, scripts, what concerns all of them
metrics.py      the process that serves metrics
embedded.py     serving()
replies.py      RESP2 and RESP3
elsewhere.py    names of commands that Redis has and the sidecar has not
lua/            what a script sees: sandbox, replies as Lua values, patterns, cjson, bit
"""

from shmcache.sidecar.embedded import Address, serving

__all__ = ["Address", "serving"]
