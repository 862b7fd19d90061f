"""The process that does what is slow: eviction ahead of demand, expiry, settling what the dead left.

Nothing depends on it. A segment without one evicts inline and settles as its CLOCK hands pass; it only pays for it in the writers.

    loop.py      Supervisor: what is done when
    start.py     supervise(): one as a child of this process
"""
