"""What is compiled: the segment's protocol (.pxd) and its edges to Python.

layout, envelope -> atomics, siphash -> token -> lock -> ring -> slab -> bucket -> big -> settle -> clock -> table (.pxd)

    _core.pyx    the edge to Python: Table, Mapping
    _claims.pyx  leases and locks
    _sweep.pyx   verify and settling
    _stream.pyx  items as records
    _dirty.pyx   what the store has not got
    _resp.pyx    the Redis protocol
    _text.pyx    its patterns and numbers
    owner.py     which process an owner is
"""
