"""Users' rules: read, applied, written, read again; what they allow; files of them."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcache import errors
from shmcache.sidecar import acl
from shmcache.sidecar.acl import BadRule, User
from shmcache.sidecar.commands.table import TABLE, categories

SECRET = b"#2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # sha256 of secret


def user(*rules):
    return User(b"bob").changed([rule.encode() if isinstance(rule, str) else rule for rule in rules])


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ("", "off resetchannels -@all"),
        ("on nopass", "on nopass resetchannels -@all"),
        ("on >secret", f"on {SECRET.decode()} resetchannels -@all"),
        (f"on {SECRET.decode()} nopass", "on nopass resetchannels -@all"),
        ("nopass >secret <secret", "off resetchannels -@all"),
        ("nopass resetpass", "off resetchannels -@all"),
        ("reset", "off sanitize-payload resetchannels -@all"),
        ("skip-sanitize-payload", "off skip-sanitize-payload resetchannels -@all"),
        ("~a* %R~b %rw~c %W~b %R~d", "off ~a* ~b ~c %R~d resetchannels -@all"),
        ("~a allkeys", "off ~* resetchannels -@all"),
        ("allkeys resetkeys ~b", "off ~b resetchannels -@all"),
        ("&a &b &a", "off resetchannels &a &b -@all"),
        ("&a allchannels", "off &* -@all"),
        ("+@all", "off resetchannels +@all"),
        ("allcommands -FLUSHALL", "off resetchannels +@all -flushall"),
        ("+@all -@dangerous", "off resetchannels +@all -@dangerous"),
        ("+@all -@admin +acl|list", "off resetchannels +@all -@admin +acl|list"),
        ("+@all nocommands +get", "off resetchannels -@all +get"),
        ("+@string +@bitmap -setrange", "off resetchannels -@all +@bitmap +@string -setrange"),
        ("+config|get", "off resetchannels -@all +config|get"),
        ("+config -config|set", "off resetchannels -@all +config -config|set"),
        ("+select|0 +SELECT|1 +select|0", "off resetchannels -@all +select|0 +select|1"),
        ("+select|0 +select", "off resetchannels -@all +select"),
        ("+select|0 +select -select", "off resetchannels -@all"),
        ("+@list +@hash", "off resetchannels -@all"),
        ("%RW~* ~a", "off %RW~* ~a resetchannels -@all"),
        ("+LPUSH +get +xinfo|stream +client|tracking", "off resetchannels -@all +get +lpush +xinfo|stream +client|tracking"),
        ("-lpush +lpush -lpush", "off resetchannels -@all"),
        ("+@all -lpush -zadd +zadd", "off resetchannels +@all -lpush"),
        ("+lpush +@all", "off resetchannels +@all"),
        ("-@all +lpush|x", "off resetchannels -@all +lpush|x"),
    ],
)
def test_what_rules_come_to(rules, line):
    assert user(*rules.split()).line == f"user bob {line}".encode()


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ("+nope", "Error in ACL SETUSER modifier '+nope': Unknown command or category name in ACL"),
        ("+@nope", "Error in ACL SETUSER modifier '+@nope': Unknown command or category name in ACL"),
        ("-select|0", "Error in ACL SETUSER modifier '-select|0': Unknown command or category name in ACL"),
        ("+config|nope", "Error in ACL SETUSER modifier '+config|nope': Unknown command or category name in ACL"),
        ("+config|get|x", "Error in ACL SETUSER modifier '+config|get|x': Allowing first-arg of a subcommand is not supported"),
        ("+get|", "Error in ACL SETUSER modifier '+get|': Syntax error"),
        ("-lpush|x", "Error in ACL SETUSER modifier '-lpush|x': Unknown command or category name in ACL"),
        ("+xinfo|nope", "Error in ACL SETUSER modifier '+xinfo|nope': Unknown command or category name in ACL"),
        ("+client|nope", "Error in ACL SETUSER modifier '+client|nope': Unknown command or category name in ACL"),
        ("+", "Error in ACL SETUSER modifier '+': Unknown command or category name in ACL"),
        ("what", "Error in ACL SETUSER modifier 'what': Syntax error"),
        ("%~a", "Error in ACL SETUSER modifier '%~a': Syntax error"),
        ("%RR~a", "Error in ACL SETUSER modifier '%RR~a': Syntax error"),
        ("%X~a", "Error in ACL SETUSER modifier '%X~a': Syntax error"),
        ("#abc", "Error in ACL SETUSER modifier '#abc': The password hash must be exactly 64 characters and contain only lowercase hexadecimal "
                 "characters"),
        ("<secret", "Error in ACL SETUSER modifier '<secret': The password you are trying to remove from the user does not exist"),
        ("allkeys ~a", "Error in ACL SETUSER modifier '~a': Adding a pattern after the * pattern (or the 'allkeys' flag) is not valid and does "
                       "not have any effect. Try 'resetkeys' to start with an empty list of patterns"),
        ("allchannels &a", "Error in ACL SETUSER modifier '&a': Adding a pattern after the * pattern (or the 'allchannels' flag) is not valid "
                           "and does not have any effect. Try 'resetchannels' to start with an empty list of channels"),
        ("(+get", "Error in ACL SETUSER modifier '(+get': Selectors are not supported by this server"),
        ("clearselectors", "Error in ACL SETUSER modifier 'clearselectors': Selectors are not supported by this server"),
    ],
)  # fmt: skip
def test_bad_rules(rules, error):
    with pytest.raises(BadRule) as e:
        user(*rules.split())
    assert str(e.value) == error


def test_patterns_with_spaces():
    for rule in (b"~a b", b"&a\0b", b"%R~a\tb", b"+select|a b"):
        with pytest.raises(BadRule):
            user(rule)


def test_a_bad_rule_changes_nothing():
    before = user("on", "~a")
    with pytest.raises(BadRule):
        before.changed([b"off", b"~b", b"+@nope"])
    assert before.line == user("on", "~a").line


words = st.text("abc*?[]-\\", max_size=4).map(str.encode)
full_names = sorted({full for names in categories().values() for full in names})
rule = st.one_of(
    st.sampled_from(
        [b"on", b"off", b"nopass", b"resetpass", b"reset", b"allkeys", b"resetkeys", b"allchannels", b"resetchannels", b"+@all", b"-@all",
         b"sanitize-payload", b"skip-sanitize-payload", b"+select|0", b"+SELECT|x", b"+debug|object", b"+select|a b"]
    ),
    st.builds(bytes.__add__, st.sampled_from([b">", b"~", b"%R~", b"%W~", b"%RW~", b"&"]), words),
    st.builds(lambda sign, name: f"{sign}{name}".encode(), st.sampled_from("+-"), st.sampled_from([*full_names, "lpush", "xinfo|stream"])),
    st.builds(lambda sign, name: f"{sign}@{name}".encode(), st.sampled_from("+-"), st.sampled_from(sorted(categories()))),
)  # fmt: skip


@given(st.lists(rule, max_size=12))
def test_a_line_read_again_is_the_same_user(rules):
    one = User(b"x")
    for each in rules:
        try:
            one.apply(each)
        except BadRule:
            pass
    other = acl.of_line(one.line)
    assert other.line == one.line
    assert (other.on, other.nopass, other.passwords, other.channels, other.all_channels, other.commands, other.elsewhere, other.later) == (
        one.on, one.nopass, one.passwords, one.channels, one.all_channels, one.commands, one.elsewhere, one.later,
    )  # fmt: skip
    for name in TABLE:
        assert other.denied(name, [b"a", b"b"]) == one.denied(name, [b"a", b"b"])


@pytest.mark.parametrize(
    ("rules", "command", "denied"),
    [
        ("+@all allkeys", "get a", None),
        ("+get ~a*", "get ab", None),
        ("+get ~a*", "get b", ("key", b"b")),
        ("+get ~a*", "set ab 1", ("command", b"set")),
        ("+get %R~a", "get a", None),
        ("+get %W~a", "get a", ("key", b"a")),
        ("+set %W~a", "set a 1", None),
        ("+set %R~a", "set a 1", ("key", b"a")),
        ("+set %W~a", "set a 1 get", ("key", b"a")),
        ("+set %RW~a", "set a 1 get", None),
        ("+incr %W~a", "incr a", ("key", b"a")),
        ("+mset ~a", "mset a 1 b 2", ("key", b"b")),
        ("+copy %R~a %W~b", "copy a b", None),
        ("+copy %R~a %W~b", "copy b a", ("key", b"b")),
        ("+rename %W~a %W~b", "rename a b", ("key", b"a")),
        ("+bitop %W~d %R~s", "bitop and d s", None),
        ("+bitop %W~d %R~s", "bitop and s d", ("key", b"s")),
        ("+bitfield %R~a", "bitfield a get u8 0", None),
        ("+bitfield %R~a", "bitfield a get u8 0 set u8 0 1", ("key", b"a")),
        ("+exists %W~a", "exists a", None),
        ("+exists %W~a", "exists b", ("key", b"b")),
        ("+object|encoding ~a", "object encoding a", None),
        ("+object|encoding ~a", "object freq a", ("command", b"object|freq")),
        ("+object|encoding ~a", "object encoding b", ("key", b"b")),
        ("+select|0", "select 0", None),
        ("+select|0", "select 1", ("command", b"select")),
        ("+debug|object", "debug OBJECT k", None),
        ("+publish &news*", "publish news1 x", None),
        ("+publish &news*", "publish other x", ("channel", b"other")),
        ("+subscribe &a*", "subscribe ab b", ("channel", b"b")),
        ("+psubscribe &a*", "psubscribe a*", None),
        ("+psubscribe &a*", "psubscribe ab*", ("channel", b"ab*")),
        ("+unsubscribe", "unsubscribe anything", None),
        ("", "auth x", None),
        ("", "ping", ("command", b"ping")),
    ],
)
def test_what_is_denied(rules, command, denied):
    name, *arguments = command.encode().split()
    assert user(*rules.split()).denied(name.decode(), arguments) == denied


def test_who_is_restricted():
    assert not acl.default_user(b"").restricted
    assert not user("+@all", "-get", "+get", "~*", "&*").restricted
    for rules in (("+@all", "~*"), ("+@all", "&*"), ("+@all", "-get", "~*", "&*"), ("+@all", "~a", "&*")):
        assert user(*rules).restricted


def test_passwords():
    bob = user("on", ">one", ">two")
    assert bob.accepts(b"one") and bob.accepts(b"two") and not bob.accepts(b"three") and not bob.accepts(b"")
    assert not bob.changed([b"off"]).accepts(b"one")
    assert not bob.changed([b"<one"]).accepts(b"one")
    assert bob.changed([b"nopass"]).accepts(b"anything")
    assert not user("on").accepts(b"")


# ---- files -------------------------------------------------------------------------------------------------------------------------------


def test_a_file_written_and_read(tmp_path):
    path = str(tmp_path / "users")
    users = [acl.default_user(b"secret"), user("on", "~a", "+get", "+select|0")]
    acl.write_file(path, users)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["users"]
    assert acl.read_file(path, b"") == {each.name: each for each in users}


def test_without_a_line_for_default_he_is_as_without_a_file(tmp_path):
    (tmp_path / "users").write_text("\n  user alice on nopass  +get \n")
    users = acl.read_file(str(tmp_path / "users"), b"secret")
    assert users[b"alice"].line == b"user alice on nopass resetchannels -@all +get"
    assert users[acl.DEFAULT].accepts(b"secret") and not users[acl.DEFAULT].at_once
    assert acl.read_file(str(tmp_path / "users"), b"")[acl.DEFAULT].at_once


@pytest.mark.parametrize("made", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_holds_nobody_up(tmp_path, made):
    made(tmp_path / "users")
    said = []

    def read():
        try:
            acl.read_file(str(tmp_path / "users"), b"")
        except errors.UsageError as e:
            said.append(str(e))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert said == [f"{tmp_path}/users is no regular file."]


def test_all_that_is_wrong_in_a_file_is_told_by_line(tmp_path):
    path = tmp_path / "users"
    path.write_text("user a on\n# remark\nuser b +nope >secret ~* ~x (x) +@what\n\nuser a off\nuser\n")
    with pytest.raises(errors.UsageError) as e:
        acl.read_file(str(path), b"")
    assert str(e.value) == (
        f"{path}:2 should start with user keyword followed by the username. {path}:3: Error in applying operation '+nope': Unknown command or "
        f"category name in ACL. {path}:3: Adding a pattern after the * pattern (or the 'allkeys' flag) is not valid and does not have any "
        f"effect. Try 'resetkeys' to start with an empty list of patterns. {path}:3: Error in applying operation '+@what': Unknown command or "
        f"category name in ACL. WARNING: Duplicate user 'a' found on line 5. {path}:6 should start with user keyword followed by the username."
    )
    assert "secret" not in str(e.value)


def test_what_is_to_be_disabled():
    assert acl.disabled([]) == frozenset()
    assert acl.disabled(["FlushAll", "config|set"]) == {"flushall", "config|set"}
    assert acl.disabled(["latency"]) == {"latency", "latency|doctor", "latency|help", "latency|history", "latency|latest", "latency|reset"}
    found = acl.disabled(["@dangerous"])
    assert {"flushall", "keys", "config|set", "acl|setuser", "shutdown"} <= found and not {"get", "config", "config|help"} & found
    for word in ("nope", "@nope", "config|nope", ""):
        with pytest.raises(errors.UsageError):
            acl.disabled([word])
