"""
A knowledge graph as a replicated document: entities, what was observed of them, and relations.

Each fact is a key of its own in one of three maps, so two agents who add to one entity at the same
time never write over each other:

    entities       name -> type
    observations   [entity, text] -> the entity's type
    relations      [from, type, to] -> ""

Adding wins over removing what the remover had not seen: a fact that was added while somebody
deleted its entity stays, and with it the entity, whose type the fact knows. Where two create an
entity at once with different types, the one written last names it, and both are in the inbox of
conflicts. A fact is in the graph once, however often it is told.

The order is that of writing: by the stamp of the oldest write that still stands, then by the
place within one call, which follows in the value (``[type, place]``) if it is not the first. So it
is the same on all replicas. A key that would be too long is the hash of its parts, and these follow
in the value too.

`Graph` keeps an index beside the document, so that no call costs more than what it touches. It is
brought up to date by what the document tells of, own and others' writes alike.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from crdtstate.crdts import Map
from crdtstate.errors import CRDTStateError
from crdtstate.events import Changed, DocumentRebuilt, IdentityRollback
from crdtstate.replica import Replica
from crdtstate.slots import Cell, candidates
from crdtstate.values import unpack

DOCUMENT = "memory"

ENTITIES, OBSERVATIONS, RELATIONS = "entities", "observations", "relations"

KEY_BYTES_MAX = 600
"""Longer keys are hashed; what a map's key may measure is little more."""

HASHED = "#"
"""How hashed keys begin."""

PLACE_MAX = 2**31

CHANGE_PATHS = 4000
"""What one change writes at most, and"""

CHANGE_BYTES = 2**19
"""how much, about. A call that writes more is several changes: what is too large nobody takes."""

BLOCK = 256
"""Entities whose texts are searched as one: far fewer steps than one for each."""

FACTS_MAX = 1_000_000
"""Entities, observations and relations together: about what a document holds."""

SEPARATOR = "\0"


class GraphError(CRDTStateError):
    """What was asked of the graph cannot be; nothing of it was done."""


class Order(NamedTuple):
    """Where a fact stands among the others."""

    stamp: int
    writer: int
    place: int


class Entity:
    """What is known by one name."""

    __slots__ = ("_facts", "_json", "_text", "block", "facts", "is_dead", "name", "own")

    def __init__(self, name: str, block: Block) -> None:
        self.name = name
        self.block = block
        # Its own entry, as (order, type); None if only observations are left.
        self.own: tuple[Order, str] | None = None
        # Text -> (order, the entity's type).
        self.facts: dict[str, tuple[Order, str]] = {}
        self.is_dead = False
        # What follows from these, while it is not altered.
        self._facts: list[str] | None = None
        self._text: str | None = None
        self._json: str | None = None

    @property
    def _first(self) -> tuple[Order, str]:
        return self.own or min(self.facts.values())

    @property
    def order(self) -> Order:
        return self._first[0]

    @property
    def type(self) -> str:
        return self._first[1]

    @property
    def observations(self) -> list[str]:
        """In their order; not to be altered."""
        if self._facts is None:
            self._facts = sorted(self.facts, key=lambda text: (self.facts[text][0], text))
        return self._facts

    @property
    def text(self) -> str:
        """All that is searched, in lower case."""
        if self._text is None:
            parts = (self.name, self.type, *self.observations)
            self._text = SEPARATOR.join(parts).lower()
        return self._text

    @property
    def line(self) -> str:
        """It as JSON on one line."""
        if self._json is None:
            told = ",".join(map(encode_basestring, self.observations))
            name, kind = encode_basestring(self.name), encode_basestring(self.type)
            self._json = (
                f'{{"type":"entity","name":{name},"entityType":{kind},"observations":[{told}]}}'
            )
        return self._json

    def altered(self) -> None:
        self._facts = self._text = self._json = None
        self.block.text = None

    def matches(self, query: str) -> bool:
        """Whether *query*, in lower case, is in its name, its type or an observation."""
        if query not in self.text:
            return False
        # Only across two texts, perhaps.
        return SEPARATOR not in query or any(
            query in part.lower() for part in (self.name, self.type, *self.facts)
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "entityType": self.type,
            "observations": list(self.observations),
        }


class Block:
    """Entities that are searched together; their text, while none is altered."""

    __slots__ = ("members", "text")

    def __init__(self) -> None:
        self.members: dict[str, Entity] = {}
        self.text: str | None = None


class Relation:
    """One relation."""

    __slots__ = ("is_dead", "line", "order", "parts")

    def __init__(self, parts: tuple[str, str, str], order: Order) -> None:
        self.parts = parts
        self.order = order
        self.is_dead = False
        source, kind, target = map(encode_basestring, parts)
        self.line = f'{{"type":"relation","from":{source},"to":{target},"relationType":{kind}}}'

    def as_dict(self) -> dict[str, Any]:
        source, kind, target = self.parts
        return {"from": source, "to": target, "relationType": kind}


class Found(NamedTuple):
    """A part of the graph, in its order."""

    entities: list[Entity]
    relations: list[Relation]

    def as_dict(self) -> dict[str, Any]:
        return {
            "entities": [entity.as_dict() for entity in self.entities],
            "relations": [relation.as_dict() for relation in self.relations],
        }


class _Write(NamedTuple):
    """What is to be written at one key; None removes it."""

    view: str
    key: str
    value: Any


class Graph:
    """The graph in a replica's document.

    Args:
        replica: Open, and with all that is to be read at first.
        on_change: Called soon after the graph has changed, whoever changed it.
    """

    def __init__(self, replica: Replica, on_change: Callable[[], None] = lambda: None) -> None:
        self._replica = replica
        self._on_change = on_change
        document = replica.document(DOCUMENT)
        self._views = {name: document.map(name) for name in (ENTITIES, OBSERVATIONS, RELATIONS)}
        self._document = document
        self.changes = 0
        """How often something has changed; tells whether anything has."""
        self._sorted: list[Entity] = []
        self._sorted_relations: list[Relation] = []
        self._is_sorted = self._are_relations_sorted = True
        self._cancels = [
            replica.on(Changed, self._note),
            replica.on(IdentityRollback, lambda _: self.rebuild()),
            replica.on(DocumentRebuilt, lambda _: self.rebuild()),
        ]
        self.rebuild()

    def close(self) -> None:
        """Follow the document no more."""
        for cancel in self._cancels:
            cancel()

    # Reading

    def __len__(self) -> int:
        """How many facts there are."""
        return len(self._entities) + self._told + len(self._relations)

    def entity(self, name: str) -> Entity | None:
        return self._entities.get(name)

    def has_relation(self, source: str, kind: str, target: str) -> bool:
        return (source, kind, target) in self._relations

    def read(self) -> Found:
        """All of it."""
        return Found(list(self._all_entities()), list(self._all_relations()))

    def lines(self) -> list[str]:
        """All of it, as lines of JSON."""
        return [e.line for e in self._all_entities()] + [r.line for r in self._all_relations()]

    def search(self, query: str) -> Found:
        """The entities in which *query* is, in whatever case, and their relations."""
        wanted = query.lower()
        found = []
        for block in self._blocks:
            if block.text is None:
                block.text = SEPARATOR.join(each.text for each in block.members.values())
            if wanted in block.text:
                found += [each for each in block.members.values() if each.matches(wanted)]
        return self._with_relations(found)

    def open(self, names: Iterable[str]) -> Found:
        """The entities of these names, and their relations."""
        wanted = dict.fromkeys(names)
        return self._with_relations([self._entities[n] for n in wanted if n in self._entities])

    def _with_relations(self, found: list[Entity]) -> Found:
        if len(found) == len(self._entities):
            # As sorting it is the most that this can cost, it is kept sorted.
            found = list(self._all_entities())
        else:
            found.sort(key=_place_of)
        touching = {
            id(each): each
            for entity in found
            for each in self._touching.get(entity.name, {}).values()
        }
        return Found(found, sorted(touching.values(), key=_place_of_relation))

    def _all_entities(self) -> list[Entity]:
        if not self._is_sorted:
            self._sorted = [each for each in self._sorted if not each.is_dead]
            self._sorted.sort(key=_place_of)
            self._is_sorted = True
        return self._sorted

    def _all_relations(self) -> list[Relation]:
        if not self._are_relations_sorted:
            self._sorted_relations = [each for each in self._sorted_relations if not each.is_dead]
            self._sorted_relations.sort(key=_place_of_relation)
            self._are_relations_sorted = True
        return self._sorted_relations

    # Writing

    def create_entities(
        self, given: Sequence[tuple[str, str, Sequence[str]]], message: str
    ) -> list[tuple[str, str, list[str]]]:
        """Add those, as (name, type, observations), whose names are not there. Returns them, each
        observation once."""
        new = [
            (name, kind, list(dict.fromkeys(texts)))
            for name, kind, texts in given
            if name not in self._entities
        ]
        self._write(_writes_of_entities(new, self._entities), message)
        return new

    def create_relations(
        self, given: Iterable[tuple[str, str, str]], message: str
    ) -> list[tuple[str, str, str]]:
        """Add those, as (from, type, to), that are not there. Returns them."""
        new = [each for each in dict.fromkeys(given) if each not in self._relations]
        self._write(_writes_of_relations(new), message)
        return new

    def add_observations(
        self, given: Sequence[tuple[str, Sequence[str]]], message: str
    ) -> list[tuple[str, list[str]]]:
        """Add those, as (entity, texts), that are not there. Returns which were added.

        Raises:
            GraphError: There is no such entity.
        """
        for name, _ in given:
            if name not in self._entities:
                raise GraphError(f"Entity with name {name} not found")
        added, writes = [], []
        told: dict[str, set[str]] = {}
        for name, texts in given:
            entity, known = self._entities[name], told.setdefault(name, set())
            new = [
                text
                for text in dict.fromkeys(texts)
                if text not in entity.facts and text not in known
            ]
            writes += self._settling(entity) if new and not known else []
            writes += [
                _observation(entity.type, place, name, text)
                for place, text in enumerate(new, len(known))
            ]
            known.update(new)
            added.append((name, new))
        self._write(writes, message)
        return added

    def delete_entities(self, names: Iterable[str], message: str) -> None:
        """Remove what is known by these names, and the relations that touch them."""
        writes: dict[tuple[str, str], _Write] = {}
        for name in dict.fromkeys(names):
            removals = [_Write(RELATIONS, key, None) for key in self._touching.get(name, ())]
            if (entity := self._entities.get(name)) is not None:
                if entity.own is not None:
                    removals.append(_Write(ENTITIES, key_of(name), None))
                removals += [
                    _Write(OBSERVATIONS, key_of(name, text), None) for text in entity.facts
                ]
            writes.update(((each.view, each.key), each) for each in removals)
        self._write(list(writes.values()), message)

    def delete_observations(self, given: Iterable[tuple[str, Iterable[str]]], message: str) -> None:
        """Remove these, as (entity, texts), where they are there."""
        writes: dict[tuple[str, str], _Write] = {}
        for name, texts in given:
            entity = self._entities.get(name)
            if entity is None:
                continue
            here = [text for text in texts if text in entity.facts]
            removals = [_Write(OBSERVATIONS, key_of(name, text), None) for text in here]
            # With the last one gone it would be gone as well.
            removals += self._settling(entity) if here else []
            writes.update(((each.view, each.key), each) for each in removals)
        self._write(list(writes.values()), message)

    def delete_relations(self, given: Iterable[tuple[str, str, str]], message: str) -> None:
        """Remove these, as (from, type, to), where they are there."""
        here = [each for each in dict.fromkeys(given) if each in self._relations]
        self._write([_Write(RELATIONS, key_of(*each), None) for each in here], message)

    def merge(
        self,
        entities: Sequence[tuple[str, str, Sequence[str]]],
        relations: Iterable[tuple[str, str, str]],
        message: str,
    ) -> int:
        """Add all of these facts that are not there; returns how many."""
        before = len(self)
        self.create_entities(entities, message)
        self.add_observations([(name, texts) for name, _, texts in entities], message)
        self.create_relations(relations, message)
        return len(self) - before

    def _settling(self, entity: Entity) -> list[_Write]:
        """What gives an entity an entry of its own, of which only observations are left."""
        if entity.own is not None:
            return []
        return [_entity(entity.type, 0, entity.name)]

    def _write(self, writes: Sequence[_Write], message: str) -> None:
        """Write in as few changes as may be, and have the index say so at once."""
        more = sum(write.value is not None for write in writes)
        if more and len(self) + more > FACTS_MAX:
            raise GraphError(
                f"the graph holds {FACTS_MAX:,} facts at most, and there are {len(self):,}; "
                "delete some, or name another file"
            )
        for part in _parts(writes):
            with self._replica.transaction(message=message[:1000]):
                for write in part:
                    view = self._views[write.view]
                    if write.value is not None:
                        view[write.key] = write.value
                    elif write.key in view:
                        del view[write.key]
            for write in part:
                self._refresh(write.view, write.key)

    # Following the document

    def rebuild(self) -> None:
        """Read the document anew."""
        self._entities: dict[str, Entity] = {}
        self._relations: dict[tuple[str, str, str], Relation] = {}
        # Name -> key -> the relations from or to it.
        self._touching: dict[str, dict[str, Relation]] = {}
        self._told = 0
        # Hashed key -> its parts, for when it is removed.
        self._hashed: dict[tuple[str, str], tuple[str, ...]] = {}
        self._blocks: list[Block] = []
        self._sorted, self._sorted_relations = [], []
        self._is_sorted = self._are_relations_sorted = True
        # The collector would look at all of it again and again, and find nothing.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            for view in self._views:
                for key in list(self._cells(view)):
                    self._refresh(view, key)
        finally:
            if was_enabled:
                gc.enable()
        self._changed()

    def _note(self, event: Changed) -> None:
        if event.document == DOCUMENT and event.kind == "map" and event.name in self._views:
            self._refresh(event.name, event.key)
            self._changed()

    def _changed(self) -> None:
        self.changes += 1
        self._on_change()

    def _cells(self, view: str) -> dict[str, Cell]:
        container = self._document.lanes.containers.get(Map.kind + view)
        return {} if container is None else container.cells

    def _refresh(self, view: str, key: str) -> None:
        """Have the index say of one key what the document says."""
        found = self._look(view, key)
        match view:
            case "entities":
                self._refresh_entity(key, found)
            case "observations":
                self._refresh_observation(key, found)
            case "relations":
                self._refresh_relation(key, found)

    def _look(self, view: str, key: str) -> tuple[tuple[str, ...], Order, str] | None:
        """What stands at a key, as (its parts, its order, the type): of several values the type is
        the last one's, and the order the first one's. Of what makes no sense, nothing."""
        cell = self._cells(view).get(key)
        if not cell:
            return None
        found = list(cell.items()) if len(cell) == 1 else candidates(cell)
        if not found or found[0][1].value is None:
            return None
        writer, slot = found[0]
        first = last = _decode(view, key, unpack(slot.value or b""))
        if len(found) > 1:
            last = _decode(view, key, unpack(found[-1][1].value or b""))
        if first is None or last is None:
            return None
        parts, _, place = first
        if key.startswith(HASHED):
            self._hashed[view, key] = parts
        return parts, Order(slot.stamp, writer, place), last[1]

    def _parts_of(self, view: str, key: str) -> tuple[str, ...] | None:
        """The parts of a key that is gone."""
        if key.startswith(HASHED):
            return self._hashed.pop((view, key), None)
        return _split(view, key)

    def _refresh_entity(self, key: str, found: tuple[tuple[str, ...], Order, str] | None) -> None:
        if found is None:
            if (parts := self._parts_of(ENTITIES, key)) and (e := self._entities.get(parts[0])):
                e.own = None
                self._altered(e)
            return
        (name,), order, kind = found
        entity = self._entities.get(name) or self._add(name)
        if entity.own != (order, kind):
            entity.own = order, kind
            self._altered(entity)

    def _refresh_observation(
        self, key: str, found: tuple[tuple[str, ...], Order, str] | None
    ) -> None:
        if found is None:
            parts = self._parts_of(OBSERVATIONS, key)
            if parts and (entity := self._entities.get(parts[0])) and parts[1] in entity.facts:
                del entity.facts[parts[1]]
                self._told -= 1
                self._altered(entity)
            return
        (name, text), order, kind = found
        entity = self._entities.get(name) or self._add(name)
        if entity.facts.get(text) != (order, kind):
            self._told += text not in entity.facts
            entity.facts[text] = order, kind
            self._altered(entity)

    def _refresh_relation(self, key: str, found: tuple[tuple[str, ...], Order, str] | None) -> None:
        if found is None:
            parts = self._parts_of(RELATIONS, key)
            gone = self._relations.pop((parts[0], parts[1], parts[2]), None) if parts else None
            if parts and gone is not None:
                gone.is_dead, self._are_relations_sorted = True, False
                for name in {parts[0], parts[2]}:
                    del self._touching[name][key]
                    if not self._touching[name]:
                        del self._touching[name]
            return
        (source, kind, target), order, _ = found
        known = self._relations.get((source, kind, target))
        if known is not None:
            self._are_relations_sorted &= known.order == order
            known.order = order
            return
        relation = Relation((source, kind, target), order)
        self._relations[source, kind, target] = relation
        for name in (source, target):
            self._touching.setdefault(name, {})[key] = relation
        last = self._sorted_relations[-1] if self._sorted_relations else relation
        self._are_relations_sorted &= _place_of_relation(last) <= _place_of_relation(relation)
        self._sorted_relations.append(relation)

    def _add(self, name: str) -> Entity:
        if not self._blocks or len(self._blocks[-1].members) >= BLOCK:
            self._blocks.append(Block())
        block = self._blocks[-1]
        entity = self._entities[name] = block.members[name] = Entity(name, block)
        self._sorted.append(entity)
        self._is_sorted = False
        return entity

    def _altered(self, entity: Entity) -> None:
        """An entity is not as it was: perhaps there is nothing left of it."""
        entity.altered()
        if entity.own is None:
            self._is_sorted = False
        if entity.own is None and not entity.facts:
            entity.is_dead = True
            del self._entities[entity.name]
            del entity.block.members[entity.name]
            if not entity.block.members:
                self._blocks.remove(entity.block)


# Keys and values


def key_of(*parts: str) -> str:
    """The key of a fact."""
    if len(parts) == 1 and not parts[0].startswith(HASHED):
        plain = parts[0]
    else:
        plain = f"[{','.join(map(encode_basestring, parts))}]"
    if len(plain) * 4 <= KEY_BYTES_MAX or len(plain.encode()) <= KEY_BYTES_MAX:
        if len(parts) > 1 or plain is parts[0]:
            return plain
    return HASHED + blake2b(plain.encode(), digest_size=20).hexdigest()


def _value(kind: str, place: int, key: str, parts: tuple[str, ...]) -> Any:
    if key.startswith(HASHED):
        return [kind, place, list(parts)]
    return [kind, place] if place else kind


def _entity(kind: str, place: int, name: str) -> _Write:
    key = key_of(name)
    return _Write(ENTITIES, key, _value(kind, place, key, (name,)))


def _observation(kind: str, place: int, name: str, text: str) -> _Write:
    key = key_of(name, text)
    return _Write(OBSERVATIONS, key, _value(kind, place, key, (name, text)))


def _writes_of_entities(
    new: Iterable[tuple[str, str, list[str]]], known: dict[str, Entity]
) -> list[_Write]:
    """The writes that add entities; of one that is named twice all observations are its."""
    writes: dict[tuple[str, str], _Write] = {}
    kinds: dict[str, str] = {}
    told: dict[str, int] = {}
    for place, (name, kind, texts) in enumerate(new):
        kind = kinds.setdefault(name, kind)
        for write in (
            _entity(kind, place, name),
            *(
                _observation(kind, number, name, text)
                for number, text in enumerate(texts, told.get(name, 0))
            ),
        ):
            writes.setdefault((write.view, write.key), write)
        told[name] = told.get(name, 0) + len(texts)
    return list(writes.values())


def _writes_of_relations(new: Iterable[tuple[str, str, str]]) -> list[_Write]:
    writes = []
    for place, parts in enumerate(new):
        key = key_of(*parts)
        writes.append(_Write(RELATIONS, key, _value("", place, key, parts)))
    return writes


WIDTHS = {ENTITIES: 1, OBSERVATIONS: 2, RELATIONS: 3}


def _split(view: str, key: str) -> tuple[str, ...] | None:
    """The parts of a key that is not hashed, if it is one as `key_of` makes them."""
    if view == ENTITIES:
        return (key,)
    try:
        parts = json.loads(key)
    except ValueError:
        return None
    if not _are_texts(parts, WIDTHS[view]) or key_of(*parts) != key:
        return None
    return tuple(parts)


def _decode(view: str, key: str, value: Any) -> tuple[tuple[str, ...], str, int] | None:
    """What a key and its value say, as (parts, type, place); None if others wrote what says
    nothing."""
    kind, place = value, 0
    given: Any = None
    if type(value) is list:
        if not 2 <= len(value) <= 3:
            return None
        kind, place, *rest = value
        given = rest[0] if rest else None
    if type(kind) is not str or type(place) is not int or not 0 <= place <= PLACE_MAX:
        return None
    if not key.startswith(HASHED):
        parts = _split(view, key)
        return None if parts is None else (parts, kind, place)
    if not _are_texts(given, WIDTHS[view]) or key_of(*given) != key:
        return None
    return tuple(given), kind, place


def _are_texts(given: Any, number: int) -> bool:
    return type(given) is list and len(given) == number and all(type(each) is str for each in given)


def _parts(writes: Sequence[_Write]) -> Iterator[list[_Write]]:
    """What goes into one change each."""
    part: list[_Write] = []
    size = 0
    for write in writes:
        more = len(write.key) + 64
        if type(write.value) is list and len(write.value) == 3:
            more += sum(4 * len(text) for text in write.value[2])
        if part and (len(part) >= CHANGE_PATHS or size + more > CHANGE_BYTES):
            yield part
            part, size = [], 0
        part.append(write)
        size += more
    if part:
        yield part


def _place_of(entity: Entity) -> tuple[Order, str]:
    return entity.order, entity.name


def _place_of_relation(relation: Relation) -> tuple[Order, tuple[str, str, str]]:
    return relation.order, relation.parts
