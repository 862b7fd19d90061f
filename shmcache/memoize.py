"""A function's results, kept by its arguments and computed once per host.

The key of a result is a digest of what the function is and of its arguments (canonical.py). A function is its module, its qualified name,
its code, its defaults, its annotations, its attributes and what it closes over. So two lambdas, the closures that one function makes, a
function that is defined again, and the functions of two programs do not share results, and a function whose code was changed starts without
any. What it calls and the globals that it reads are not part of it. `name` replaces all that.

What a function closes over, and its attributes, count as they are when the function is memoized; or when it is first called, if a variable
that it closes over, or that a function in it does, has no value yet. Of a function of singledispatch, in itself or in another, counts what
is registered at the call. An argument that is left out counts as its default is at the call.
"""

from __future__ import annotations

import functools
import types
import warnings
from hashlib import blake2b

from shmcache import codec, errors
from shmcache.canonical import canonical, code_digest, identity, module_name
from shmcache.core import _core
from shmcache.flight import MISSING, Terms, get_or_set

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import timedelta
    from typing import Any

    from shmcache.cache import Cache
    from shmcache.canonical import Identity

PREFIX = b"\x00memo\x00"
DIGEST_BYTES = 20
SHOWN_BYTES = 200  # of a function's name, in its keys
LONGEST_NAME = 4096 - len(PREFIX) - 1 - DIGEST_BYTES
VARARGS, VARKEYWORDS, NO_RESULT = 0x04, 0x08, 0x20 | 0x80 | 0x100 | 0x200  # of co_flags; the last: generators and coroutines

_named: dict[tuple[str, bytes], bytes] = {}  # (segment, name=) -> what this process has memoized under it


def memoize(
    cache: Cache, ttl: float | timedelta | None, name: bytes | str | None, lease: float, stale_ttl: float | timedelta | None,
    early: float | bool, tags: Iterable[str] | Callable[..., Iterable[str]] | None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Cache.memoize."""
    if callable(ttl) or isinstance(ttl, classmethod):
        raise errors.UsageError("memoize is called: @cache.memoize() or @cache.memoize(ttl=60)")
    prefix = None if name is None else _core.own_key(PREFIX, name, "the name of memoized results", LONGEST_NAME) + b"\x00"
    any_object = cache._codec_name == "pickle"
    salt = bytes([codec.PICKLE if any_object else codec.MSGPACK])

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        check(function)
        called = getattr(function, "__qualname__", type(function).__qualname__)
        # What tells the function from all others, and what that depends on. They are one: of two threads that register with a function of
        # singledispatch and call, one may leave both of earlier, never the old identity beside the new registrations. The next call finds
        # that they differ.
        known: Identity = b"", False, []
        if prefix is None:
            module = module_name(getattr(function, "__module__", None), getattr(function, "__globals__", {}))
            begins = PREFIX + f"{module}.{called}".encode("utf-8", "backslashreplace")[:SHOWN_BYTES] + b"\x00"
            known = identified(function, called)
        else:
            begins = prefix
            note_name(cache.name, begins, function, called)
        arguments = Arguments(function, called, any_object)

        def cache_key(*args: Any, **kwargs: Any) -> bytes:
            nonlocal known
            made, waits, registrations = known
            if waits or (registrations and any(registered != registry for registry, registered in registrations)):
                known = identified(function, called)
                made = known[0]
            digest = blake2b(made, digest_size=DIGEST_BYTES, person=b"memoize", salt=salt)
            digest.update(arguments.bytes_of(args, kwargs))
            return begins + digest.digest()

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            key = cache_key(*args, **kwargs)
            value = cache.get(key, MISSING)
            if value is not MISSING:
                return value
            terms = Terms(cache, ttl, stale_ttl, early, tags(*args, **kwargs) if callable(tags) else tags)
            return get_or_set(cache, key, lambda: function(*args, **kwargs), lease, terms)

        wrapper.cache_key = cache_key  # type: ignore[attr-defined]
        wrapper.forget = lambda *args, **kwargs: cache.delete(cache_key(*args, **kwargs))  # type: ignore[attr-defined]
        wrapper._memoized = (wrapper, function)  # type: ignore[attr-defined]
        return wrapper

    return decorate


def check(function: Any) -> None:
    """Can it be memoized? Raises: UsageError."""
    if isinstance(function, (staticmethod, classmethod)):
        raise errors.UsageError(f"memoize takes the function itself: write @{type(function).__name__} above @cache.memoize(...)")
    if isinstance(function, type) or not callable(function):
        raise errors.UsageError(f"memoize takes a function, not {function!r}: memoize one that makes it, or calls it")
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    if code is not None and code.co_flags & NO_RESULT:
        raise errors.UsageError(
            f"{code.co_name} is a coroutine function or a generator, which has no result to keep: let it return a list, or await "
            "get_or_set() of a shmcache.aio.Cache"
        )


def identified(function: Callable[..., Any], called: str) -> Identity:
    """What tells a function from all others. Raises: UnsupportedValue."""
    try:
        return identity(function)
    except errors.UnsupportedValue as e:
        raise errors.UnsupportedValue(f"memoize cannot tell {called} from other functions: {e}; or name it yourself, by name=") from e


def note_name(segment: str, name: bytes, function: Callable[..., Any], called: str) -> None:
    """Warn of functions that get each other's results."""
    what = code_digest(function.__code__) if type(function) is types.FunctionType else called.encode("utf-8", "backslashreplace")
    if _named.setdefault((segment, name), what) != what:
        _named[segment, name] = what
        shown = name[len(PREFIX) : -1].decode("utf-8", "backslashreplace")
        text = f"two functions are memoized under the name {shown!r}: each may be given the other's results"
        warnings.warn(text, errors.SharedName, stacklevel=3)


class Arguments:
    """How the arguments of a function's calls become bytes: those of f(1), f(a=1) and of f(1, 2) are the same if f is f(a, b=2)."""

    def __init__(self, function: Callable[..., Any], called: str, any_object: bool) -> None:
        self._function, self._called, self._any_object = function, called, any_object
        self._code = function.__code__ if type(function) is types.FunctionType else None
        if self._code is not None:
            self._n_positional = self._code.co_argcount
            self._names = self._code.co_varnames[: self._n_positional + self._code.co_kwonlyargcount]

    def bytes_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """Raises: UnsupportedValue; TypeError: the function does not take these."""
        if self._code is None:
            return self._one("arguments", (args, kwargs))
        values, rest = args, kwargs
        if kwargs or len(args) != len(self._names) or len(args) != self._n_positional:
            values, rest = self._bound(self._code, args, kwargs)
        made = [self._one(name, value) for name, value in zip(self._names, values, strict=False)]
        if self._code.co_flags & (VARARGS | VARKEYWORDS):
            made.append(self._one("*", (values[len(self._names) :], rest)))
        return b"".join(made)

    def _bound(self, code: types.CodeType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A value for each name, and what there is more of them; and of kwargs what has no name."""
        n = min(len(args), self._n_positional)
        values, more, rest = list(args[:n]), args[n:], dict(kwargs)
        defaults, named = self._function.__defaults__ or (), self._function.__kwdefaults__ or {}
        first = self._n_positional - len(defaults)
        for i in range(n, len(self._names)):
            name = self._names[i]
            if i >= code.co_posonlyargcount and name in rest:
                values.append(rest.pop(name))
            elif first <= i < self._n_positional:
                values.append(defaults[i - first])
            elif name in named and i >= self._n_positional:
                values.append(named[name])
            else:
                raise self._refused(args, kwargs)
        twice = rest and not rest.keys().isdisjoint(self._names[code.co_posonlyargcount : n])
        if (more and not code.co_flags & VARARGS) or (rest and not code.co_flags & VARKEYWORDS) or twice:
            raise self._refused(args, kwargs)
        return (*values, *more), rest

    def _refused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TypeError:
        """What is wrong with these arguments, in the words of inspect."""
        import inspect

        try:
            inspect.signature(self._function, follow_wrapped=False).bind(*args, **kwargs)
        except TypeError as e:
            return TypeError(f"{self._called}: {e}")
        return TypeError(f"{self._called} does not take these arguments")

    def _one(self, name: str, value: Any) -> bytes:
        try:
            return canonical(value, self._any_object)
        except errors.UnsupportedValue as e:
            if self._is_default(name, value):
                return b"-" + self._of_default(value)
            raise errors.UnsupportedValue(
                f"{self._called}: of {name!r} no key can be made: {e}. Or memoize a function of what it takes of it (an id, say)"
            ) from e

    def _of_default(self, value: Any) -> bytes:
        """As it is now. If no key can be made of it (a connection), then the function has a name=, and that it is the default counts."""
        try:
            return canonical(value, True)
        except errors.UnsupportedValue:
            return b"-"

    def _is_default(self, name: str, value: Any) -> bool:
        function = self._function
        if type(function) is not types.FunctionType or name not in self._names:
            return False
        i = self._names.index(name)
        defaults = function.__defaults__ or ()
        if i >= self._n_positional:
            return (function.__kwdefaults__ or {}).get(name) is value
        at = i - (self._n_positional - len(defaults))
        return at >= 0 and defaults[at] is value
