"""
What the arguments of a `Replica` may be.

They are checked at the door, before anything is opened or changed, and trusted inside. What is
wrong is said in one sentence, with what is wanted and what came instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from crdtstate import wire
from crdtstate.config import Config
from crdtstate.credentials import Credentials
from crdtstate.errors import UsageError
from crdtstate.events import Event
from crdtstate.retention import Retention
from crdtstate.tiers import Tier
from crdtstate.tiers import check_url as check_tier_url
from crdtstate.transports import check_scheme

TIERS_MAX = 8


def check_agent(agent: object) -> None:
    """Raise UsageError if this cannot be an agent's name."""
    if not isinstance(agent, str) or not 0 < len(agent) <= 100 or not agent.isprintable():
        raise UsageError(f"an agent's name has 1 to 100 printable characters, not {agent!r}")


def check_settings(role: object, config: object, store: object, durability: object) -> None:
    """Raise UsageError if a replica cannot be of this kind."""
    if role not in ("agent", "relay"):
        raise UsageError(f'role is "agent" or "relay", not {role!r}')
    if config is not None and not isinstance(config, Config):
        raise UsageError(f"config is a crdtstate.Config, not {config!r}")
    if store is not None and not isinstance(store, (str, os.PathLike)):
        raise UsageError(f"store is the path of a file, not {store!r}")
    if durability not in ("process", "power"):
        raise UsageError(f'durability is "process" or "power", not {durability!r}')


def check_peers(peers: object) -> None:
    """Raise UsageError if this is no list; its URLs are for `check_url`."""
    if isinstance(peers, str) or not isinstance(peers, Iterable):
        raise UsageError("peers is a list of URLs, not one URL")


def check_url(url: object) -> None:
    """Raise UsageError if this is not a URL that a replica can dial or listen on."""
    if not isinstance(url, str):
        raise UsageError(f"a URL is a str such as ws://127.0.0.1:8765, not {url!r}")
    check_scheme(url)


def check_checkpoints(tiers: object) -> list[str | Tier]:
    """The tiers of checkpoints; raises UsageError if this names none, one twice, or too many."""
    if isinstance(tiers, str) or not isinstance(tiers, Iterable):
        raise UsageError("checkpoints is a list of URLs, not one URL")
    found = list(tiers)
    if not 0 < len(found) <= TIERS_MAX or len(set(map(_tier_url, found))) < len(found):
        raise UsageError(f"checkpoints names 1 to {TIERS_MAX} tiers, each once, not {found!r}")
    return found


def check_retention(retention: object) -> None:
    """Raise UsageError if this is not what says which checkpoints are kept."""
    if retention is not None and not isinstance(retention, Retention):
        raise UsageError(f"retention is a crdtstate.Retention, not {retention!r}")


def _tier_url(tier: object) -> str:
    if isinstance(tier, Tier):
        return tier.url
    check_tier_url(tier)
    return str(tier)


def check_credentials(agent: str, credentials: Credentials) -> None:
    """Raise UsageError if an agent of this name cannot be who the credentials say it is."""
    found = credentials.certificate
    if found is not None and found.agent != agent:
        raise UsageError(f"the join token is that of {found.agent!r}, and this is {agent!r}")


def check_lan(word: object) -> None:
    """Raise UsageError if this is no word that replicas on a network can share."""
    if not isinstance(word, str) or not word:
        raise UsageError(f"lan is a word that replicas share, not {word!r}")


def check_patterns(patterns: object) -> tuple[str, ...]:
    """The documents to subscribe to; raises UsageError if this names none, or too many."""
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise UsageError(f"subscribe is a list of documents' names, not {patterns!r}")
    found = tuple(patterns)
    if not found or len(found) > wire.PATTERNS_MAX:
        raise UsageError(f"subscribe names 1 to {wire.PATTERNS_MAX} documents, not {len(found)}")
    for each in found:
        if not isinstance(each, str) or not 0 < len(each) <= wire.NAME_CHARS_MAX:
            raise UsageError(f"subscribe is a list of documents' names, not {each!r}")
    return found


def check_event(event: object) -> None:
    """Raise UsageError if this is no type of event."""
    if not isinstance(event, type) or not issubclass(event, Event):
        raise UsageError(f"events are told apart by type, such as crdtstate.Changed, not {event!r}")
