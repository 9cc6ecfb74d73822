"""
The settings of a relay, and where they come from.

A setting may be given as a flag (``--listen``), in the environment (``CRDTSTATE_RELAY_LISTEN``) and
in a TOML file (``listen = ...``); the first of these that has it counts, and the default if none
does. Those of `crdtstate.Config` stand in the file's table ``[config]`` and in the environment as
``CRDTSTATE_RELAY_CONFIG_...``, those of `crdtstate.Limits` in ``[limits]`` and as
``CRDTSTATE_RELAY_LIMITS_...``. Keys are the flags' names.

All of it is checked before anything is opened, unknown keys included: a typo must not become a
default. What is wrong is said in one line with the file or variable, the key, and what is allowed.
"""

from __future__ import annotations

import json
import re
import ssl
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from crdtstate.admission import HINT, is_private
from crdtstate.arguments import check_checkpoints
from crdtstate.config import Config
from crdtstate.errors import UsageError
from crdtstate.limits import Limits

DEFAULT_LISTEN = "ws://127.0.0.1:8765"
PREFIX = "CRDTSTATE_RELAY_"
TABLES: dict[str, type] = {"config": Config, "limits": Limits}
"""The tables of a file, and what their keys are fields of."""
DRAIN_MAX = 600.0

ONE_OF = {"peers": "peer", "modules": "module", "origins": "origin"}
"""Keys of which a flag gives one at a time."""

ORIGIN = re.compile(r"https?://[a-z0-9.\-]+(:\d{1,5})?|https?://\[[0-9a-f:.]+\](:\d{1,5})?")
"""As browsers write it."""

Durability = Literal["process", "power"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a relay is told. Each field is a key: ``tls_key`` is ``tls-key``.

    Attributes:
        listen: Where to listen; port 0 takes any free one.
        mesh: The file of the join token, or of the words, of the mesh; None: only processes of
            the same user on this machine.
        token_file: The file of the token for the pages; None: see `pages.tokens`.
        advertise: The URL that members are told to reach it by; None: *listen*, unless that is on
            all interfaces.
        store: The SQLite file that keeps everything; None: memory only.
        peers: URLs of other relays.
        checkpoints: The tiers that keep checkpoints, nearest first; none: none are made.
        origins: Whose pages may write documents from a browser, such as ``https://app.example``,
            beside the relay's own.
        modules: Python modules to import, which register the validators that documents use.
        durability: What a commit survives: a kill, or a power cut as well.
        name: What peers see.
        tls_certificate: The certificate chain to show, in PEM; wss:// needs it.
        tls_key: Its private key, if that is not in the same file.
        drain: Seconds to wait, when told to stop, until peers have what is here.
        attached: Stop when standard input ends, as it does with the program that holds it.
        json: Announce the address as JSON.
        config: The settings of the replica; its `limits` among them.
        sources: Where each key that is no default comes from; ``config.heartbeat`` for those.
    """

    listen: str = DEFAULT_LISTEN
    advertise: str | None = None
    mesh: str | None = None
    token_file: str | None = None
    store: str | None = None
    peers: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    durability: Durability = "process"
    name: str = "relay"
    tls_certificate: str | None = None
    tls_key: str | None = None
    drain: float = 5.0
    attached: bool = False
    json: bool = False
    config: Config = field(default_factory=Config)
    sources: Mapping[str, str] = field(default_factory=dict)

    def tls_context(self) -> ssl.SSLContext | None:
        """What a wss:// listener shows; None for ws://.

        Raises:
            UsageError: The certificate or key cannot be read, or do not fit.
        """
        if self.tls_certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_certificate, self.tls_key)
        except (OSError, ssl.SSLError) as exc:
            key = f" with tls-key {self.tls_key!r}" if self.tls_key else ""
            why = exc.strerror or str(exc)
            source = self.sources.get("tls_certificate", "")
            what = f"tls-certificate {self.tls_certificate!r}{key}"
            raise UsageError(f"{source}: {what}: {why}") from exc
        return context

    def as_toml(self) -> str:
        """The settings as a file of settings, with the source of each."""
        return "".join(line + "\n" for line in self._toml_lines())

    def _toml_lines(self) -> Iterator[str]:
        for key in KEYS:
            yield self._toml_line(_dashed(key), key, getattr(self, key))
        for table, names in FIELDS.items():
            yield f"\n[{table}]"
            of = self.config if table == "config" else self.config.limits
            for name in names:
                yield self._toml_line(name, f"{table}.{name}", getattr(of, name))

    def _toml_line(self, name: str, key: str, value: Any) -> str:
        source = self.sources.get(key, "default")
        if value is None:
            return f"# {name} is not set"
        # What TOML and JSON share: strings, numbers, booleans and lists of them.
        return f"{name} = {json.dumps(value, ensure_ascii=False)}  # {source}"

    def as_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        found = {_dashed(key): getattr(self, key) for key in KEYS}
        config = {name: getattr(self.config, name) for name in FIELDS["config"]}
        limits = {name: getattr(self.config.limits, name) for name in FIELDS["limits"]}
        return {**found, "config": config, "limits": limits, "sources": dict(self.sources)}


KEYS = tuple(each.name for each in fields(Settings) if each.name not in ("config", "sources"))


class _Given(NamedTuple):
    """A value, and what to call it when it is wrong."""

    value: Any
    source: str
    label: str


def load(
    flags: Mapping[str, Any], environment: Mapping[str, str], path: str | None = None
) -> Settings:
    """Gather the settings.

    Args:
        flags: Those given on the command line, by field.
        environment: The environment's variables.
        path: The file; else the variable CRDTSTATE_RELAY_CONFIG names it, if there is one.

    Raises:
        UsageError: Something in them cannot be; the message is one line for people.
    """
    path = path or environment.get(f"{PREFIX}CONFIG") or None
    given: dict[str, _Given] = {}
    if path is not None:
        given |= _from_file(path)
    given |= _from_environment(environment)
    for key, value in flags.items():
        flag = f"--{_dashed(ONE_OF.get(key, key))}"
        given[key] = _Given(tuple(value) if key in ONE_OF else value, flag, flag)
    for key, found in given.items():
        if check := CHECKS.get(key):
            check(found)
    values = {key: found.value for key, found in given.items() if key in KEYS}
    sources = {key: found.source for key, found in given.items()}
    settings = Settings(**values, config=_config(given), sources=sources)
    _check_tls(settings, given)
    _check_mesh(settings, given)
    return settings


# Reading


def _from_file(path: str) -> dict[str, _Given]:
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: not valid TOML: {exc}") from exc
    tables = {name: content.pop(name, {}) for name in TABLES}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {name} is a table: write [{name}]")
    known = {_dashed(key): key for key in KEYS}
    found = {}
    for name, value in content.items():
        if name not in known:
            allowed = ", ".join([*sorted(known), *(f"[{each}]" for each in TABLES)])
            raise UsageError(f"{path}: unknown key {name!r}; there are {allowed}")
        found[known[name]] = _Given(value, path, f"{path}: {name}")
    for table, content in tables.items():
        for name, value in content.items():
            if name not in FIELDS[table]:
                allowed = ", ".join(sorted(FIELDS[table]))
                raise UsageError(f"{path}: unknown key {name!r} in [{table}]; there are {allowed}")
            found[f"{table}.{name}"] = _Given(value, path, f"{path}: {table}.{name}")
    return {key: _typed(key, each) for key, each in found.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, _Given]:
    known = {PREFIX + key.upper(): key for key in KEYS}
    for table, names in FIELDS.items():
        known |= {f"{PREFIX}{table.upper()}_{name.upper()}": f"{table}.{name}" for name in names}
    found = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable == f"{PREFIX}CONFIG" or not text:
            continue
        if variable not in known:
            allowed = ", ".join(PREFIX + key.upper() for key in KEYS)
            raise UsageError(
                f"unknown variable {variable}; there are {allowed}, {PREFIX}CONFIG_... for "
                f"{', '.join(FIELDS['config'])}, and {PREFIX}LIMITS_... for "
                f"{', '.join(FIELDS['limits'])}"
            )
        key = known[variable]
        value = _parsed(_type_of(key), text)
        found[key] = _typed(key, _Given(value, variable, variable))
    return found


def _parsed(wanted: Any, text: str) -> Any:
    """The value that a variable's *text* stands for; what it cannot be stays text, to be refused
    as that."""
    if wanted == STRINGS:
        return text.replace(",", " ").split()
    if wanted is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if wanted in (int, float):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
    return text


# Checking


def _type_of(key: str) -> Any:
    table, _, name = key.rpartition(".")
    return FIELDS[table][name] if table else TYPES[key]


def _typed(key: str, found: _Given) -> _Given:
    """*found*, if its value is of the type of *key*. Raises UsageError."""
    wanted, value = _type_of(key), found.value
    if wanted == STRINGS:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise _refused(found, "a list of strings")
        return found._replace(value=tuple(value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if get_origin(wanted) is Literal:
        is_right = value in get_args(wanted)
        what = " or ".join(f'"{each}"' for each in get_args(wanted))
    elif wanted is bool:
        is_right, what = isinstance(value, bool), "true or false"
    elif wanted is int:
        is_right, what = is_number and isinstance(value, int), "a whole number"
    elif wanted is float:
        is_right, what = is_number, "a number"
    else:
        is_right, what = isinstance(value, str), "a string"
    if not is_right:
        raise _refused(found, what)
    return found


def _refused(found: _Given, what: str) -> UsageError:
    return UsageError(f"{found.label} must be {what}, not {found.value!r}")


def is_url(text: object) -> bool:
    """Whether *text* is a URL of a relay or agent."""
    try:
        parts = urlsplit(text) if isinstance(text, str) else None
        return (
            parts is not None
            and parts.scheme in ("ws", "wss")
            and bool(parts.hostname and (parts.port or 1))
        ) or (parts is not None and parts.scheme == "unix" and parts.path.startswith("/"))
    except ValueError:
        return False


def _check_listen(found: _Given) -> None:
    if not is_url(found.value):
        raise _refused(found, f"a URL like {DEFAULT_LISTEN}")


def _check_peers(found: _Given) -> None:
    for url in found.value:
        if not is_url(url):
            raise _refused(found._replace(value=url), f"a URL like {DEFAULT_LISTEN}")


def _check_checkpoints(found: _Given) -> None:
    try:
        if found.value:
            check_checkpoints(found.value)
    except UsageError as exc:
        raise UsageError(f"{found.label}: {exc}") from exc


def _check_origins(found: _Given) -> None:
    for origin in found.value:
        if not ORIGIN.fullmatch(origin):
            raise _refused(found._replace(value=origin), "an origin, such as https://app.example")


def _check_modules(found: _Given) -> None:
    for name in found.value:
        if not all(part.isidentifier() for part in name.split(".")):
            raise _refused(found._replace(value=name), "the name of a Python module")


def _check_name(found: _Given) -> None:
    if not (0 < len(found.value) <= 100 and found.value.isprintable()):
        raise _refused(found, "1 to 100 printable characters")


def _check_drain(found: _Given) -> None:
    if not 0 <= found.value <= DRAIN_MAX:
        raise _refused(found, f"a number from 0 to {DRAIN_MAX:g}")


def _check_path(found: _Given) -> None:
    if not found.value or "\0" in found.value or Path(found.value).is_dir():
        raise _refused(found, "the path of a file")


CHECKS: dict[str, Callable[[_Given], None]] = {
    "listen": _check_listen,
    "advertise": _check_listen,
    "peers": _check_peers,
    "checkpoints": _check_checkpoints,
    "modules": _check_modules,
    "origins": _check_origins,
    "name": _check_name,
    "drain": _check_drain,
    "store": _check_path,
    "mesh": _check_path,
    "token_file": _check_path,
    "tls_certificate": _check_path,
    "tls_key": _check_path,
}


def _check_tls(settings: Settings, given: Mapping[str, _Given]) -> None:
    has = [key for key in ("tls_certificate", "tls_key") if key in given]
    if settings.tls_key is not None and settings.tls_certificate is None:
        raise UsageError(f"{given['tls_key'].label} needs tls-certificate as well")
    if settings.listen.startswith("wss:") and not has:
        raise UsageError(f"{given['listen'].label}: wss:// needs tls-certificate and tls-key")
    if has and not settings.listen.startswith("wss:"):
        raise UsageError(f"{given[has[0]].label}: only wss:// takes it, not {settings.listen}")


def _check_mesh(settings: Settings, given: Mapping[str, _Given]) -> None:
    for key, urls in (("listen", [settings.listen]), ("peers", settings.peers)):
        for url in urls:
            if settings.mesh is None and not is_private(url):
                label = given[key].label if key in given else key
                raise UsageError(f"{label}: {url}: beyond this machine a mesh is needed; {HINT}")


def _config(given: Mapping[str, _Given]) -> Config:
    made: Config = _made(given, "config", limits=_made(given, "limits"))
    return made


def _made(given: Mapping[str, _Given], table: str, **more: Any) -> Any:
    """What a table says, as what it is."""
    mine = {key: found for key, found in given.items() if key.startswith(f"{table}.")}
    try:
        return TABLES[table](
            **{key.partition(".")[2]: found.value for key, found in mine.items()}, **more
        )
    except UsageError as exc:
        named = [found.label for key, found in mine.items() if key.partition(".")[2] in str(exc)]
        raise UsageError(f"{', '.join(named or [table])}: {exc}") from exc


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _types(of: type) -> dict[str, Any]:
    """The types of a dataclass's fields, without None where that is one of them."""
    found = get_type_hints(of)
    for name, hint in found.items():
        parts = [part for part in get_args(hint) if part is not NoneType]
        if len(parts) == 1 and parts != list(get_args(hint)):
            found[name] = parts[0]
    return found


STRINGS = tuple[str, ...]
TYPES = _types(Settings)
FIELDS = {
    table: {each.name: _types(of)[each.name] for each in fields(of) if each.name not in TABLES}
    for table, of in TABLES.items()
}
