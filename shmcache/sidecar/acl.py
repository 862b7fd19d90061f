"""Users and what each may do: Redis' rules, as ACL SETUSER and ACL files have them, read, checked and written again.

A User that others can see is never changed: changed() makes another, which takes its place. Selectors, `(...)`, are refused.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import hmac
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shmcache import errors
from shmcache.core._text import matches
from shmcache.sidecar import replies
from shmcache.sidecar.commands.table import MOST_PATTERN, NO_AUTH, SUBCOMMANDS, TABLE, WRITE, categories, family, full_name, keys_in, shown
from shmcache.sidecar.elsewhere import ELSEWHERE
from shmcache.sidecar.replies import bulk, integer
from shmcache.supervisor.format import open_regular

DEFAULT = b"default"
READS, WRITES = 1, 2
MODES = {READS: b"%R~", WRITES: b"%W~", READS | WRITES: b"~"}
# What a command does to its first key and to the others. Of the rest: those that are flagged so write, without looking; others read
ACCESS = {
    # no value is told: any pattern of the key will do
    **dict.fromkeys(["exists", "memory", "object", "strlen", "touch", "type", "watch"], (0, 0)),
    **dict.fromkeys(
        ["bitfield", "decr", "decrby", "eval", "evalsha", "fcall", "getdel", "getex", "getset", "incr", "incrby", "incrbyfloat", "setbit"],
        (3, 3),
    ),
    "lease.get": (3, 3),
    "rename": (3, WRITES), "renamenx": (3, WRITES), "copy": (READS, WRITES), "bitop": (WRITES, READS),
}  # fmt: skip
CHANNELS = {"publish": False, "subscribe": False, "psubscribe": True}  # are the channels patterns?
HASH = re.compile(rb"[0-9a-f]{64}")


class BadRule(Exception):
    """In Redis' words."""


class UnknownName(BadRule):
    """Of a command or a category: others may have been meant, so that the rule is told."""


@functools.cache
def all_commands() -> frozenset[str]:
    return frozenset(full for name in TABLE for full in family(name))


@functools.cache
def of_category(category: str) -> frozenset[str]:
    """What a rule for it changes: its commands, with all their subcommands."""
    return frozenset(other for full in categories()[category] for other in (full, *family(full)))


def digest(password: bytes) -> bytes:
    return hashlib.sha256(password).hexdigest().encode()


def has_spaces(name: bytes) -> bool:
    return re.search(rb"[\s\0]", name) is not None


@dataclass
class User:
    name: bytes
    on: bool = False
    nopass: bool = False
    sanitize: bytes = b""  # a flag of Redis that is kept and means nothing here: no payload of RESTORE is trusted
    passwords: dict[bytes, None] = field(default_factory=dict)  # hex of their SHA-256
    all_keys: bool = False
    keys: dict[bytes, int] = field(default_factory=dict)  # pattern: READS | WRITES
    all_channels: bool = False
    channels: dict[bytes, None] = field(default_factory=dict)
    later: bool = False  # after +@all: commands that there are not yet, too
    commands: set[str] = field(default_factory=set)  # full names
    first_arguments: dict[str, dict[bytes, bytes]] = field(default_factory=dict)  # with which a command is allowed that else is not;
    # in lower case: as it was said
    elsewhere: dict[str, None] = field(default_factory=dict)  # what Redis has and is not here, and the opposite of `later` was said of

    @property
    def restricted(self) -> bool:
        return not (self.all_keys and self.all_channels and len(self.commands) == len(all_commands()))

    @property
    def at_once(self) -> bool:
        """Of `default`: is a connection his without AUTH?"""
        return self.on and self.nopass

    def accepts(self, password: bytes) -> bool:
        given = digest(password)
        found = [hmac.compare_digest(given, known) for known in self.passwords]
        return self.on and (self.nopass or any(found))

    # -- changing it

    def changed(self, rules: Iterable[bytes]) -> User:
        """This user after these rules. Raises: BadRule: with the rule, and what is wrong."""
        user = copy.deepcopy(self)
        for rule in rules:
            try:
                user.apply(rule)
            except BadRule as e:
                raise BadRule(f"Error in ACL SETUSER modifier '{shown(rule)}': {e}") from None
        return user

    def apply(self, rule: bytes) -> None:
        """Raises: BadRule."""
        word, rest = rule.lower(), rule[1:]
        if word in (b"on", b"off"):
            self.on = word == b"on"
        elif word in (b"sanitize-payload", b"skip-sanitize-payload"):
            self.sanitize = word
        elif word in (b"nopass", b"resetpass"):
            self.nopass, self.passwords = word == b"nopass", {}
        elif word in (b"allkeys", b"~*", b"resetkeys"):
            self.all_keys, self.keys = word != b"resetkeys", {}
        elif word in (b"allchannels", b"&*", b"resetchannels"):
            self.all_channels, self.channels = word != b"resetchannels", {}
        elif word in (b"allcommands", b"+@all", b"nocommands", b"-@all"):
            self.later = word in (b"allcommands", b"+@all")
            self.commands, self.first_arguments, self.elsewhere = set(all_commands()) if self.later else set(), {}, {}
        elif word == b"reset":
            for each in (b"resetpass", b"resetkeys", b"resetchannels", b"off", b"sanitize-payload", b"-@all"):
                self.apply(each)
        elif rule[:1] in (b">", b"#", b"<", b"!"):
            self.change_passwords(rule[:1], rest)
        elif rule[:1] in (b"~", b"%"):
            self.add_keys(rule)
        elif rule[:1] == b"&":
            if self.all_channels:
                raise BadRule(
                    "Adding a pattern after the * pattern (or the 'allchannels' flag) is not valid and does not have any effect. Try "
                    "'resetchannels' to start with an empty list of channels"
                )
            self.channels[spaceless(rest)] = None
        elif rule[:1] in (b"+", b"-"):
            self.change_commands(rule[:1] == b"+", rest.decode("latin-1"))
        elif rule[:1] == b"(" or word == b"clearselectors":
            raise BadRule("Selectors are not supported by this server")
        elif rule:
            raise BadRule("Syntax error")

    def change_passwords(self, how: bytes, rest: bytes) -> None:
        if how in (b"#", b"!") and not HASH.fullmatch(rest):
            raise BadRule("The password hash must be exactly 64 characters and contain only lowercase hexadecimal characters")
        hashed = rest if how in (b"#", b"!") else digest(rest)
        if how in (b">", b"#"):
            self.passwords[hashed] = None
            self.nopass = False
        elif hashed in self.passwords:
            del self.passwords[hashed]
        else:
            raise BadRule("The password you are trying to remove from the user does not exist")

    def add_keys(self, rule: bytes) -> None:
        if self.all_keys:
            raise BadRule(
                "Adding a pattern after the * pattern (or the 'allkeys' flag) is not valid and does not have any effect. Try 'resetkeys' "
                "to start with an empty list of patterns"
            )
        found = re.fullmatch(rb"(?:~|%(R|W|RW|WR)(?:~|\Z))(.*)", rule, re.IGNORECASE | re.DOTALL)
        if found is None:
            raise BadRule("Syntax error")
        said = (found[1] or b"RW").upper()
        pattern = spaceless(found[2])
        self.keys[pattern] = self.keys.get(pattern, 0) | (READS if b"R" in said else 0) | (WRITES if b"W" in said else 0)

    def change_commands(self, allow: bool, said: str) -> None:
        name = said.lower()
        if name.startswith("@"):
            if name[1:] not in categories():
                raise UnknownName("Unknown command or category name in ACL")
            self.allow(of_category(name[1:]), allow)
            return
        if name in all_commands():
            self.allow(family(name), allow)
            return
        if name in ELSEWHERE:
            self.note_elsewhere(name, allow)
            return
        parent, bar, word = name.rpartition("|")
        if not (allow and bar and (parent in all_commands() or parent in ELSEWHERE)):
            raise UnknownName("Unknown command or category name in ACL")
        if "|" in parent:
            raise BadRule("Allowing first-arg of a subcommand is not supported")
        if not word or has_spaces(word.encode("latin-1")):
            raise BadRule("Syntax error")
        if parent in SUBCOMMANDS or any(other.startswith(parent + "|") for other in ELSEWHERE):
            raise UnknownName("Unknown command or category name in ACL")
        if parent in ELSEWHERE:
            self.note_elsewhere(name, allow)
            return
        known = self.first_arguments.setdefault(parent, {})
        as_said = said.rpartition("|")[2].encode("latin-1")
        known.setdefault(as_said.lower(), as_said)

    def note_elsewhere(self, name: str, allow: bool) -> None:
        """It changes nothing here: it is written again."""
        if allow == self.later:
            self.elsewhere.pop(name, None)
        else:
            self.elsewhere[name] = None

    def allow(self, names: Iterable[str], allow: bool) -> None:
        for name in names:
            self.first_arguments.pop(name, None)
        if allow:
            self.commands.update(names)
        else:
            self.commands.difference_update(names)

    # -- writing it

    @property
    def flags(self) -> list[bytes]:
        return [b"on" if self.on else b"off", *([b"nopass"] if self.nopass else []), *([self.sanitize] if self.sanitize else [])]

    @property
    def key_rules(self) -> list[bytes]:
        if self.all_keys:
            return [b"~*"]
        # not ~*, as Redis has it: no other pattern may follow that one, and the line could not be read again
        return [b"%RW~*" if (pattern, mode) == (b"*", READS | WRITES) else MODES[mode] + pattern for pattern, mode in self.keys.items()]

    @property
    def channel_rules(self) -> list[bytes]:
        return [b"&*"] if self.all_channels else [b"&" + pattern for pattern in self.channels]

    @property
    def command_rules(self) -> list[bytes]:
        """Found as Redis finds them: category after category, first the one that differs least from what he may do; then what is left."""
        made, left = User(b"", commands=set(all_commands()) if self.later else set()), set(self.commands)
        words = ["+@all" if self.later else "-@all"]
        open_categories = list(categories())
        while True:
            best: tuple[int, int, str] | None = None
            for category in open_categories:
                n, allowed = len(categories()[category]), len(categories()[category] & left)
                same, other = (n - allowed, allowed) if self.later else (allowed, n - allowed)
                if same > other and (best is None or (other, -same) < best[:2]):
                    best = other, -same, category
            if best is None:
                break
            words.append(f"{'-' if self.later else '+'}@{best[2]}")
            made.allow(of_category(best[2]), not self.later)
            left = left | of_category(best[2]) if self.later else left - of_category(best[2])
            open_categories.remove(best[2])
        rules = [word.encode() for word in words]
        for name in TABLE:
            for full in family(name):
                allowed_now = full in self.commands
                if allowed_now != (full in made.commands):
                    rules.append((b"+" if allowed_now else b"-") + full.encode())
                    made.allow(family(full), allowed_now)
                if not allowed_now:
                    rules += [b"+%b|%b" % (full.encode(), argument) for argument in self.first_arguments.get(full, {}).values()]
        return rules + [(b"-" if self.later else b"+") + name.encode("latin-1") for name in self.elsewhere]

    @property
    def rules(self) -> list[bytes]:
        """Of a new user they make this one."""
        return [
            *self.flags, *(b"#" + known for known in self.passwords), *self.key_rules,
            *([] if self.all_channels else [b"resetchannels"]), *self.channel_rules, *self.command_rules,
        ]  # fmt: skip

    @property
    def line(self) -> bytes:
        """As ACL LIST and ACL files have it."""
        return b" ".join((b"user", self.name, *self.rules))

    # -- asking it

    def denied(self, name: str, arguments: list[bytes]) -> tuple[str, bytes] | None:
        """What of a command this user may not: ("command", its full name), ("key", it), ("channel", it); None: he may run it."""
        full = full_name(name, arguments)
        if full not in self.commands and not TABLE[name].flags & NO_AUTH:
            known = self.first_arguments.get(full)
            if not known or not arguments or arguments[0].lower() not in known:
                return "command", full.encode()
        if not self.all_keys:
            first, rest = access_of(name, arguments)
            for i, key in enumerate(keys_in(name, arguments)):
                if not self.may_touch(key, rest if i else first):
                    return "key", key
        if not self.all_channels and name in CHANNELS:
            for channel in arguments[:1] if name == "publish" else arguments:
                if not self.may_hear(channel, CHANNELS[name]):
                    return "channel", channel
        return None

    def may_touch(self, key: bytes, mode: int) -> bool:
        if len(key) > MOST_PATTERN:  # there is no such key, and to match it takes long
            return False
        for pattern, known in self.keys.items():  # noqa: SIM110  # a generator would cost more than the rest, for each command
            if mode & known == mode and matches(pattern, key):
                return True
        return False

    def may_hear(self, channel: bytes, is_pattern: bool) -> bool:
        """A pattern has to be one of this user's, as it is written."""
        if self.all_channels:
            return True
        if is_pattern:
            return channel in self.channels
        return len(channel) <= MOST_PATTERN and any(matches(pattern, channel) for pattern in self.channels)

    def hears_less(self, was: User) -> bool:
        """May he not hear what he might before? (That a pattern covers another is not seen.)"""
        return not self.all_channels and (was.all_channels or not was.channels.keys() <= self.channels.keys())


def spaceless(pattern: bytes) -> bytes:
    if has_spaces(pattern):
        raise BadRule("Syntax error")
    return pattern


def access_of(name: str, arguments: list[bytes]) -> tuple[int, int]:
    """What a command does to its first key, and to the others."""
    if name == "set" and b"get" in [word.lower() for word in arguments[2:]]:
        return READS | WRITES, 0
    if name == "bitfield" and len(arguments) % 3 == 1 and {word.lower() for word in arguments[1::3]} <= {b"get"}:
        return READS, 0
    return ACCESS.get(name) or ((WRITES, WRITES) if TABLE[name].flags & WRITE else (READS, READS))


# ---- what was refused ------------------------------------------------------------------------------------------------------------


@dataclass
class Refusal:
    """An entry of ACL LOG."""

    reason: str  # command, key, channel, auth
    context: str  # toplevel, multi, lua
    what: bytes
    user: bytes
    client: str
    when: float
    count: int = 1

    def is_like(self, other: Refusal) -> bool:
        mine, others = ((r.reason, r.context, r.what, r.user) for r in (self, other))
        return mine == others and abs(self.when - other.when) <= 60

    def shown(self, protocol: int) -> bytes:
        age = f"{time.time() - self.when:.17g}".encode()
        return replies.map_(
            (
                (bulk("count"), integer(self.count)),
                (bulk("reason"), bulk(self.reason)),
                (bulk("context"), bulk(self.context)),
                (bulk("object"), bulk(self.what)),
                (bulk("username"), bulk(self.user)),
                (bulk("age-seconds"), b",%b\r\n" % age if protocol == 3 else bulk(age)),
                (bulk("client-info"), bulk(self.client)),
            ),
            protocol,
        )


def note(log: list[Refusal], refusal: Refusal, most: int) -> None:
    """Put it first; with one of the last ten that is like it they are one."""
    for i, other in enumerate(log[:10]):
        if other.is_like(refusal):
            refusal.count += log.pop(i).count
            break
    log.insert(0, refusal)
    del log[most:]


# ---- all of them ------------------------------------------------------------------------------------------------------------------


def default_user(password: bytes) -> User:
    """Who everybody is that has not authenticated as another; no password: so at once."""
    return User(DEFAULT).changed([b"+@all", b"~*", b"&*", b"on", b">" + password if password else b"nopass"])


def of_line(line: bytes) -> User:
    """Raises: BadRule."""
    _, name, *rules = line.split(b" ")
    return User(name).changed(rules)


def read_file(path: str, password: bytes) -> dict[bytes, User]:
    """The users of an ACL file; if it has no line for `default`, that one as if there were no file. Raises: OSError; UsageError: all that
    is wrong in it, by line, or that it is no regular file."""
    users: dict[bytes, User] = {}
    wrong = []
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except errors.DamagedFile:
        raise errors.UsageError(f"{path} is no regular file.") from None
    for number, line in enumerate(lines, 1):
        words = line.strip(b" \t\r\n").split(b" ")
        if words == [b""]:
            continue
        if words[0] != b"user" or len(words) < 2:
            wrong.append(f"{path}:{number} should start with user keyword followed by the username.")
        elif has_spaces(words[1]):
            wrong.append(f"'{path}:{number}: username '{shown(words[1])}' contains invalid characters.")
        elif words[1] in users:
            wrong.append(f"WARNING: Duplicate user '{shown(words[1])}' found on line {number}.")
        else:
            users[words[1]] = user = User(words[1])
            wrong += applied(user, words[2:], f"{path}:{number}")
    if wrong:
        raise errors.UsageError(" ".join(wrong))
    users.setdefault(DEFAULT, default_user(password))
    return users


def applied(user: User, rules: list[bytes], place: str) -> Iterator[str]:
    """Apply a line's rules: what is wrong. Of names all that are unknown; of the rest the first, not shown: it may be a password."""
    shy = False
    for rule in rules:
        try:
            user.apply(rule.strip(b"\t\r\n"))
        except UnknownName as e:
            yield f"{place}: Error in applying operation '{shown(rule)}': {e}."
        except BadRule as e:
            if not shy:
                yield f"{place}: {e}."
            shy = True


def write_file(path: str, users: Iterable[User]) -> None:
    """Raises: OSError: the file is as it was."""
    folder = Path(path).parent
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".acl-", delete=False) as file:
        try:
            file.write(b"".join(user.line + b"\n" for user in users))
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def disabled(words: Iterable[str]) -> frozenset[str]:
    """Full names of commands that are to be unknown: of a command, a subcommand (config|set), a @category. Raises: UsageError."""
    found: set[str] = set()
    for word in words:
        name = word.lower()
        if name.startswith("@") and name[1:] in categories():
            found |= of_category(name[1:])
        elif name in all_commands():
            found.update(family(name))
        else:
            raise errors.UsageError(f"{word!r}: there is no such command or category")
    return frozenset(found)
