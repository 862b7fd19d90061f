"""Is what processes saw of one key what one register would have shown them? A checker of linearizability for a cache.

A history is a list of operations on one key, each with the time at which it was asked for and at which it was answered. It is linearizable
if every operation can be given one instant between these two, so that in the order of these instants each of them answered what the
specification says (Herlihy and Wing 1990). Keys are checked one by one, which suffices: a history is linearizable if that of each object
is. clear() is taken into every key's history as a delete; that it takes all keys at one instant is not checked.

The specification (`step`): a register that holds nothing or a value, the value's version and the time at which it expires. A value may
vanish before that time only if `may_vanish`, and then never comes back. Versions only grow; each change of the value or its time gives
the key a new one. Whether a value's time is over an operation may judge at any instant between its call and its answer, not only at the
one at which it takes effect, but not behind that one: a cas that found the value in time succeeds, though a reader misses it before the new
one is there; a reader that was asked before the value was given more time, and answers behind its former end, does not miss it. A touch gives the time
before the version: while it is under way gets() may answer the version from before it, with which a cas is then refused.

The search (`check`) goes through the calls and answers in the order of time, with the set of all states that the register may be in, each
together with those calls under way that have taken effect already: "just-in-time linearization" (Lowe, "Testing for linearizability",
2017), breadth-first, so that equal configurations are one. A history of n operations of few processes takes O(n).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# kinds of operations; `value` and `version` as the operation has them
GET = 0  # value: seen, 0: a miss
GETS = 1  # value, version: seen
IN = 2  # value: 1 if it was there, else 0
SET = 3  # value: stored
ADD = 4  # these: value: stored if `done`
REPLACE = 5
CAS = 6  # seen, version: what gets() gave
INCR = 7  # value: the new number; not done: there was none
COUNT = 8  # incr with a default: the same, and what is stored if there was none is `seen`
POP = 9  # value: seen, 0: a miss
DELETE = 10  # done: it was there
TOUCH = 11  # done: it was there
CLEAR = 12
NAMES = ("get", "gets", "in", "set", "add", "replace", "cas", "incr", "incr with default", "pop", "delete", "touch", "clear")

MS = 1_000_000
NEVER = 1 << 62


class Op(NamedTuple):
    called: int  # ns, of a clock that all processes share
    returned: int
    kind: int
    value: int = 0
    done: bool = True
    seen: int = 0
    version: int = 0
    ttl_ms: int = 0  # 0: it never expires
    worker: int = 0
    unsure: bool = False  # it failed half way: it may have taken effect, or not
    counter: bool = False  # incr changes a number before its version: gets() may give the new one with the old version

    def __str__(self) -> str:
        what = [NAMES[self.kind], f"value={self.value:#x}", "" if self.done else "refused", f"seen={self.seen:#x}" if self.seen else ""]
        what += [f"version={self.version}" if self.version else "", f"ttl={self.ttl_ms}ms" if self.ttl_ms else "", "unsure" if self.unsure else ""]
        return f"[{self.called / 1e3:.0f}..{self.returned / 1e3:.0f} us] worker {self.worker}: " + " ".join(filter(None, what))


class State(NamedTuple):
    value: int = 0  # 0: nothing
    version: int = 0  # 0: above `least`
    least: int = 0  # every version from now on is above
    expires: tuple[int, int] = (NEVER, NEVER)  # ns: not before the first, surely behind the second
    former: int = 0  # by a touch: the version before it, which is seen until `until` at the latest; 0: one above `least`
    until: int = 0


def held(state: State, value: int, op: Op) -> State:
    """The state with a new value (or the same one, and a new time), and a version that nobody has seen yet."""
    # the segment's clock counts whole milliseconds
    expires = (op.called + op.ttl_ms * MS - MS, op.returned + op.ttl_ms * MS + MS) if op.ttl_ms else (NEVER, NEVER)
    return State(value, 0, max(state.version, state.least), expires)


def gone(state: State) -> State:
    return State(0, 0, max(state.version, state.least))


def may_have_version(state: State, version: int) -> bool:
    return version == state.version if state.version else version > state.least


def step(state: State, op: Op, may_vanish: bool, now: int) -> Iterator[State]:
    """The states in which the operation leaves the register, if it takes effect in this one, not later than now, and answers what it did;
    none: it cannot."""
    kind = op.kind
    present = state.value != 0 and op.called <= state.expires[1]
    over = state.value != 0 and now >= state.expires[0]
    absent = state.value == 0 or over or may_vanish
    left = state if over else gone(state)  # by an operation that finds nothing there, and stores nothing
    if kind == SET:
        yield held(state, op.value, op)
    elif kind == CLEAR:
        yield gone(state)
    elif kind in (GET, GETS, IN, POP) and op.value == 0:
        if absent:
            yield left
    elif kind == IN:
        if present:
            yield state
    elif kind in (GET, GETS, POP):
        if not present or state.value != op.value:
            return
        if kind == GET:
            yield state
        elif kind == POP:
            yield gone(state)
        elif op.counter:
            if not state.version or op.version <= state.version:
                yield state
        else:
            if may_have_version(state, op.version):
                yield state._replace(version=op.version)
            if op.called <= state.until and (op.version == state.former or (state.former == state.version == 0 and op.version > state.least)):
                yield state._replace(former=op.version, least=max(state.least, op.version))
    elif kind == ADD:
        if op.done and absent:
            yield held(state, op.value, op)
        elif not op.done and present:
            yield state
    elif kind == COUNT and op.value == op.seen:
        if absent:
            yield held(state, op.value, op)
    elif kind in (INCR, COUNT) and op.done:
        if present and state.value + 1 == op.value:
            yield State(op.value, 0, max(state.version, state.least), state.expires)
    elif kind == CAS:
        same = state.value == op.seen and may_have_version(state, op.version)
        if op.done and present and same:
            yield held(state, op.value, op)
        elif not op.done:
            if absent:
                yield left
            if present and not (state.version and same):
                yield state
    elif kind == TOUCH and op.done:
        if present:
            yield held(state, state.value, op)._replace(former=state.version, until=op.returned)
    elif op.done and present:  # REPLACE, DELETE
        yield gone(state) if kind == DELETE else held(state, op.value, op)
    elif not op.done and absent:  # and INCR
        yield left


def check(history: list[Op], may_vanish: bool = False) -> Op | None:
    """The first operation whose answer nothing explains, or None: the history is linearizable. It begins with nothing stored."""
    events = sorted([(op.called, 0, i) for i, op in enumerate(history)] + [(op.returned, 1, i) for i, op in enumerate(history)])
    under_way: set[int] = set()
    configurations: set[tuple[State, frozenset[int]]] = {(State(), frozenset())}
    for _, answers, i in events:
        if not answers:
            under_way.add(i)
            continue
        configurations = answered(history, configurations, under_way, i, may_vanish)
        if not configurations:
            return history[i]
        under_way.remove(i)
    return None


def answered(
    history: list[Op], configurations: set[tuple[State, frozenset[int]]], under_way: set[int], last: int, may_vanish: bool
) -> set[tuple[State, frozenset[int]]]:
    """What is possible once this operation has been answered: it has taken effect by now, behind any of the others that are under way."""
    after = set()
    todo = list(configurations)
    met = set(todo)
    while todo:
        state, effective = todo.pop()
        if last in effective:
            after.add((state, effective - {last}))
            continue
        if history[last].unsure:
            after.add((state, effective))
        for i in under_way - effective:
            for then in step(state, history[i], may_vanish, history[last].returned):
                new = (then, effective | {i})
                if new not in met:
                    met.add(new)
                    todo.append(new)
    return after
