"""The segment over the Redis protocol: for programs on this host that are not Python, and for tools that speak to Redis.

core/_resp.pyx  the protocol parsed, and what is called often executed on the segment
server.py       Connection, Server: one event loop and its pool of threads
commands.py     the other commands
worker.py       one process with one Server
serve.py        `shmcache serve`: the supervisor and so many workers, started again when they die
bus.py          between the event loops: publish, subscribe, CONFIG SET
replies.py      RESP2 and RESP3
"""
