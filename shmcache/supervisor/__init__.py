"""The process that does what is slow: eviction ahead of demand, expiry, settling what the dead left.

Nothing depends on it. A segment without one evicts inline and settles as its CLOCK hands pass; it only pays for it in the writers.

    loop.py       Supervisor: what is done when
    snapshot.py   snapshots: written, found, restored with the log since
    appendlog.py  the append log: out of the rings, into files
    datadir.py    the directory that both are in
    format.py     the bytes of their files
    dump.py       items as a stream for ordinary tools
    writeback.py  stores what the cache has and its store has not yet
    batch.py      how much one call of the store is given
    refused.py    rows that the store refuses
    start.py      supervise(): one as a child of this process
"""
