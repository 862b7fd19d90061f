"""FunctionStore: the data comes from functions (of a service's client, of an ORM), a key at a time or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from shmcache import errors
from shmcache.core import _core
from shmcache.stores import MISSING, TIMEOUT, Entry, checked, checked_items, lifetime


class FunctionStore:
    """Functions as a Store: `FunctionStore(load=fetch_user)`.

    Args:
        load: load(key) returns the value, or Entry(value, ttl); if there is none it raises KeyError or returns MISSING, of this package.
        load_many: in place of load: load_many(keys) returns a mapping of those found, to values or Entries.
        save: save(key, value, ttl). delete: delete(key), which may raise KeyError. A store without them can only be read.
        timeout: seconds that a call may take by default. It is looked at before each function's call: none is interrupted. Let save and
            delete end within it, by limits of their own: one that takes longer than the policy allows can come after a later write.

    Keys are bytes. An OSError (of a connection, a time-out) becomes StoreUnavailable; another error in a load is raised as it is. In save
    and delete a UsageError of this package (StoreRefused, say) is that key's refusal: nothing was done, nor will be. So is a ValueError or
    a TypeError, but an unsettled one, for it may be about an answer. The other keys follow. Any other error (a client's own time-out, say)
    is an unsettled StoreUnavailable: what was asked for may be done later.
    """

    ordered = False

    def __init__(
        self,
        load: Callable[[bytes], Any] | None = None,
        *,
        load_many: Callable[[list[bytes]], Mapping[bytes, Any]] | None = None,
        save: Callable[[bytes, Any, float | None], object] | None = None,
        delete: Callable[[bytes], object] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        if (load is None) == (load_many is None):
            raise errors.InvalidConfig("a FunctionStore has either load or load_many: give it one of them")
        self._load_many = load_many if load is None else None
        self._load, self._save, self._delete = load, save, delete
        self._timeout = timeout
        self._closed = False

    def load_many(self, keys: Sequence[bytes], *, timeout: float | None = None) -> dict[bytes, Entry]:
        found: Mapping[bytes, Any] = {}
        wanted = checked(keys)
        if self._load_many is not None:
            for _ in self._in_time([None], timeout):
                found = _call(self._load_many, list(wanted))
        else:
            found = {key: self._loaded(key) for key in self._in_time(wanted, timeout)}
        answers = ((key, found.get(key, MISSING)) for key in wanted)
        return {key: x if isinstance(x, Entry) else Entry(x) for key, x in answers if x is not MISSING}

    def _loaded(self, key: bytes) -> Any:
        assert self._load is not None
        try:
            return _call(self._load, key)
        except KeyError:
            return MISSING

    def store_many(
        self, items: Mapping[bytes, tuple[Any, float | None]], *, timeout: float | None = None, versions: Mapping[bytes, int] | None = None
    ) -> None:
        save = self._save
        if save is None:
            raise errors.StoreRefused("this FunctionStore has no save: give it one, or do not write")
        entries = checked_items(items)

        def put(key: bytes) -> None:
            value, ttl = entries[key]
            save(key, value, lifetime(ttl))

        self._each(put, list(entries), timeout, versions)

    def delete_many(self, keys: Sequence[bytes], *, timeout: float | None = None, versions: Mapping[bytes, int] | None = None) -> None:
        delete = self._delete
        if delete is None:
            raise errors.StoreRefused("this FunctionStore has no delete: give it one, or do not delete")

        def gone(key: bytes) -> None:
            try:
                delete(key)
            except KeyError:
                pass

        self._each(gone, checked(keys), timeout, versions)

    def close(self) -> None:
        self._closed = True

    def _each(
        self, function: Callable[[bytes], object], keys: Iterable[bytes], timeout: float | None, versions: Mapping[bytes, int] | None
    ) -> None:
        if versions is not None:
            raise errors.UsageError("a FunctionStore is not ordered: do not give it versions")
        refused: dict[bytes, Exception] = {}
        unsettled = False  # of what is refused
        try:
            for key in self._in_time(keys, timeout):
                try:
                    _call(function, key)
                except errors.StoreUnavailable as e:
                    e.unsettled = True
                    raise
                except (errors.UsageError, ValueError, TypeError) as e:
                    refused[key] = e
                    unsettled |= not isinstance(e, errors.UsageError)
                except Exception as e:
                    unknown = errors.StoreUnavailable(f"{type(e).__name__}: {e}; it was done or not, or will be; try again")
                    unknown.unsettled = True
                    raise unknown from e
        except errors.StoreUnavailable as e:  # the time may be over behind one that may still be done
            e.unsettled |= unsettled
            raise
        if refused:
            error = errors.RowsRefused(refused)
            error.unsettled = unsettled
            raise error

    def _in_time(self, of: Iterable[Any], timeout: float | None) -> Iterable[Any]:
        """Those, until the time is over. Raises: StoreUnavailable."""
        if self._closed:
            raise errors.UsageError("this store was closed: make another")
        deadline = _core.monotonic() + (self._timeout if timeout is None else timeout)
        for x in of:
            if _core.monotonic() >= deadline:
                raise errors.StoreUnavailable("the time was over before all keys had their turn: try again, with more time or fewer keys")
            yield x


def _call(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except OSError as e:
        raise errors.StoreUnavailable(f"{type(e).__name__}: {e}; try again") from e
