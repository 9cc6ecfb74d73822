"""
The nine tools, as `@modelcontextprotocol/server-memory` has them: names, schemas, annotations,
answers and errors are the same to the letter, so that assistants find what they know.

Beyond that there are bounds: names, texts, and how many of them one call may bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from crdtstate.integrations.mcp_memory.graph import Entity, Found, Graph, GraphError, Relation

NAME_CHARS_MAX = 1000
"""Of entities, their types, and relations."""

TEXT_CHARS_MAX = 100_000
"""Of an observation, and of what is searched for."""

ITEMS_MAX = 10_000
"""Names and texts that one call may bring."""

DRAFT = "http://json-schema.org/draft-07/schema#"

MESSAGES = {
    "delete_entities": "Entities deleted successfully",
    "delete_observations": "Observations deleted successfully",
    "delete_relations": "Relations deleted successfully",
}


# What arguments look like: str, [shape] for a list, {name: shape} for an object

Shape = Any

ENTITY: Shape = {"name": str, "entityType": str, "observations": [str]}
RELATION: Shape = {"from": str, "to": str, "relationType": str}
ADDITION: Shape = {"entityName": str, "contents": [str]}
DELETION: Shape = {"entityName": str, "observations": [str]}


class Answer(NamedTuple):
    """What a tool answers: the text for people and models, and the same as data."""

    text: str
    data: dict[str, Any]


class Tool(NamedTuple):
    """One tool; *run* takes the graph, checked arguments, and what the change is to say of why."""

    name: str
    title: str
    description: str
    shape: dict[str, Shape]
    input: dict[str, Any]
    output: dict[str, Any]
    reads: bool
    destroys: bool
    run: Callable[[Graph, dict[str, Any], str], Answer]

    @property
    def annotations(self) -> dict[str, bool]:
        return {
            "readOnlyHint": self.reads,
            "destructiveHint": self.destroys,
            "idempotentHint": self.reads or self.destroys,
            "openWorldHint": False,
        }

    @property
    def definition(self) -> dict[str, Any]:
        """It as ``tools/list`` tells."""
        return {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "inputSchema": _object(self.input, is_top=True),
            "annotations": self.annotations,
            "execution": {"taskSupport": "forbidden"},
            "outputSchema": _object(self.output, is_top=True, is_closed=True),
        }


# Schemas


def _object(
    properties: dict[str, Any], *, is_top: bool = False, is_closed: bool = False
) -> dict[str, Any]:
    found: dict[str, Any] = {"$schema": DRAFT} if is_top else {}
    found |= {"type": "object", "properties": properties}
    if properties:
        found["required"] = list(properties)
    if is_closed:
        found["additionalProperties"] = False
    return found


def _array(items: dict[str, Any], description: str = "") -> dict[str, Any]:
    return {"type": "array", "items": items} | _described(description)


def _string(description: str = "") -> dict[str, Any]:
    return {"type": "string"} | _described(description)


def _described(description: str) -> dict[str, Any]:
    return {"description": description} if description else {}


def _entities(is_closed: bool = False) -> dict[str, Any]:
    about = "An array of observation contents associated with the entity"
    properties = {
        "name": _string("The name of the entity"),
        "entityType": _string("The type of the entity"),
        "observations": _array(_string(), about),
    }
    return _array(_object(properties, is_closed=is_closed))


def _relations(is_closed: bool = False, description: str = "") -> dict[str, Any]:
    properties = {
        "from": _string("The name of the entity where the relation starts"),
        "to": _string("The name of the entity where the relation ends"),
        "relationType": _string("The type of the relation"),
    }
    return _array(_object(properties, is_closed=is_closed), description)


_GRAPH = {"entities": _entities(True), "relations": _relations(True)}
_DONE = {"success": {"type": "boolean"}, "message": _string()}


# Running them


def _create_entities(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    given = [(e["name"], e["entityType"], e["observations"]) for e in arguments["entities"]]
    new = graph.create_entities(given, message)
    text = [_entity_text(*each, 2) for each in new]
    keys = ("name", "entityType", "observations")
    return Answer(
        _list(text, 0), {"entities": [dict(zip(keys, each, strict=True)) for each in new]}
    )


def _create_relations(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    new = graph.create_relations(_triples(arguments), message)
    text = [_relation_text(each, 2) for each in new]
    data = [{"from": source, "to": to, "relationType": kind} for source, kind, to in new]
    return Answer(_list(text, 0), {"relations": data})


def _add_observations(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    given = [(each["entityName"], each["contents"]) for each in arguments["observations"]]
    added = graph.add_observations(given, message)
    text = [
        _record([("entityName", encode_basestring(name)), ("addedObservations", _texts(new, 4))], 2)
        for name, new in added
    ]
    data = [{"entityName": name, "addedObservations": new} for name, new in added]
    return Answer(_list(text, 0), {"results": data})


def _delete_entities(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    graph.delete_entities(arguments["entityNames"], message)
    return _done("delete_entities")


def _delete_observations(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    given = [(each["entityName"], each["observations"]) for each in arguments["deletions"]]
    graph.delete_observations(given, message)
    return _done("delete_observations")


def _delete_relations(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    graph.delete_relations(_triples(arguments), message)
    return _done("delete_relations")


def _read_graph(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    return answer_of(graph.read())


def _search_nodes(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    return answer_of(graph.search(arguments["query"]))


def _open_nodes(graph: Graph, arguments: dict[str, Any], message: str) -> Answer:
    return answer_of(graph.open(arguments["names"]))


def _triples(arguments: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(each["from"], each["relationType"], each["to"]) for each in arguments["relations"]]


def _done(tool: str) -> Answer:
    message = MESSAGES[tool]
    return Answer(message, {"success": True, "message": message})


# Answers, as JSON.stringify(value, null, 2) writes them; json.dumps with an indent is slow


def answer_of(found: Found) -> Answer:
    """A part of the graph as an answer."""
    return Answer(text_of(found), found.as_dict())


def text_of(found: Found) -> str:
    """A part of the graph as text."""
    entities = [_text_of(entity, 4) for entity in found.entities]
    relations = [_text_of_relation(relation, 4) for relation in found.relations]
    return _record([("entities", _list(entities, 2)), ("relations", _list(relations, 2))], 0)


def _text_of(entity: Entity, indent: int) -> str:
    return _entity_text(entity.name, entity.type, entity.observations, indent)


def _text_of_relation(relation: Relation, indent: int) -> str:
    return _relation_text(relation.parts, indent)


def _entity_text(name: str, kind: str, texts: list[str], indent: int) -> str:
    fields = [
        ("name", encode_basestring(name)),
        ("entityType", encode_basestring(kind)),
        ("observations", _texts(texts, indent + 2)),
    ]
    return _record(fields, indent)


def _relation_text(parts: tuple[str, str, str], indent: int) -> str:
    source, kind, target = map(encode_basestring, parts)
    return _record([("from", source), ("to", target), ("relationType", kind)], indent)


def _texts(texts: list[str], indent: int) -> str:
    return _list([encode_basestring(text) for text in texts], indent)


def _record(fields: list[tuple[str, str]], indent: int) -> str:
    pad = "\n" + " " * (indent + 2)
    inside = ",".join(f'{pad}"{name}": {value}' for name, value in fields)
    return f"{{{inside}\n{' ' * indent}}}"


def _list(items: list[str], indent: int) -> str:
    if not items:
        return "[]"
    pad = "\n" + " " * (indent + 2)
    return f"[{pad}{f',{pad}'.join(items)}\n{' ' * indent}]"


# Checking what comes


def check(tool: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as the tool takes them: of what it does not know, nothing.

    Raises:
        GraphError: They are not of its shape, or too much. Nothing was done.
    """
    faults: list[str] = []
    found = _take(tool.shape, arguments, "", faults)
    if faults:
        raise GraphError(
            "MCP error -32602: Input validation error: Invalid arguments for tool "
            f"{tool.name}: " + "\n".join(faults)
        )
    _check_bounds(tool, found)
    return dict(found)


def _take(shape: Shape, given: Any, where: str, faults: list[str]) -> Any:
    """What *given* has of a shape; notes what is wrong as Zod says it."""
    wanted: dict[Any, str] = {str: "string", list: "array", dict: "object"}
    kind: Any = shape if isinstance(shape, type) else type(shape)
    if type(given) is not kind:
        at = f" at {where}" if where else ""
        faults.append(f"Invalid input: expected {wanted[kind]}, received {_name_of(given)}{at}")
        return None
    if kind is list:
        return [_take(shape[0], each, f"{where}[{i}]", faults) for i, each in enumerate(given)]
    if kind is dict:
        prefix = f"{where}." if where else ""
        return {
            name: _take(inner, given.get(name, _MISSING), prefix + name, faults)
            for name, inner in shape.items()
        }
    return given


_MISSING = object()


def _name_of(given: Any) -> str:
    names = {str: "string", list: "array", dict: "object", bool: "boolean", type(None): "null"}
    return "undefined" if given is _MISSING else names.get(type(given), "number")


def _check_bounds(tool: Tool, arguments: Any) -> None:
    number = 0
    for field, text in _strings("", arguments):
        number += 1
        most = TEXT_CHARS_MAX if field in LONG else NAME_CHARS_MAX
        if len(text) > most:
            raise GraphError(
                f"{tool.name}: {field} has {len(text):,} characters, from {text[:40]!r} on; "
                f"{most:,} is the limit, split it"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise GraphError(
                f"{tool.name}: {field} is no valid Unicode, from {text[:40]!r} on"
            ) from None
    if number > ITEMS_MAX:
        raise GraphError(
            f"{tool.name}: {number:,} names and texts in one call; {ITEMS_MAX:,} is the limit, "
            "make several calls"
        )


LONG = ("observations", "contents", "query")


def _strings(field: str, given: Any) -> Iterator[tuple[str, str]]:
    """All texts in arguments, each with the name of its field."""
    match given:
        case str():
            yield field, given
        case list():
            for each in given:
                yield from _strings(field, each)
        case dict():
            for name, each in given.items():
                yield from _strings(name, each)


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "create_entities",
            "Create Entities",
            "Create multiple new entities in the knowledge graph",
            {"entities": [ENTITY]},
            {"entities": _entities()},
            {"entities": _entities(True)},
            False,
            False,
            _create_entities,
        ),
        Tool(
            "create_relations",
            "Create Relations",
            "Create multiple new relations between entities in the knowledge graph. "
            "Relations should be in active voice",
            {"relations": [RELATION]},
            {"relations": _relations()},
            {"relations": _relations(True)},
            False,
            False,
            _create_relations,
        ),
        Tool(
            "add_observations",
            "Add Observations",
            "Add new observations to existing entities in the knowledge graph",
            {"observations": [ADDITION]},
            {
                "observations": _array(
                    _object(
                        {
                            "entityName": _string(
                                "The name of the entity to add the observations to"
                            ),
                            "contents": _array(
                                _string(), "An array of observation contents to add"
                            ),
                        }
                    )
                )
            },
            {
                "results": _array(
                    _object(
                        {"entityName": _string(), "addedObservations": _array(_string())},
                        is_closed=True,
                    )
                )
            },
            False,
            False,
            _add_observations,
        ),
        Tool(
            "delete_entities",
            "Delete Entities",
            "Delete multiple entities and their associated relations from the knowledge graph",
            {"entityNames": [str]},
            {"entityNames": _array(_string(), "An array of entity names to delete")},
            _DONE,
            False,
            True,
            _delete_entities,
        ),
        Tool(
            "delete_observations",
            "Delete Observations",
            "Delete specific observations from entities in the knowledge graph",
            {"deletions": [DELETION]},
            {
                "deletions": _array(
                    _object(
                        {
                            "entityName": _string(
                                "The name of the entity containing the observations"
                            ),
                            "observations": _array(_string(), "An array of observations to delete"),
                        }
                    )
                )
            },
            _DONE,
            False,
            True,
            _delete_observations,
        ),
        Tool(
            "delete_relations",
            "Delete Relations",
            "Delete multiple relations from the knowledge graph",
            {"relations": [RELATION]},
            {"relations": _relations(description="An array of relations to delete")},
            _DONE,
            False,
            True,
            _delete_relations,
        ),
        Tool(
            "read_graph",
            "Read Graph",
            "Read the entire knowledge graph",
            {},
            {},
            _GRAPH,
            True,
            False,
            _read_graph,
        ),
        Tool(
            "search_nodes",
            "Search Nodes",
            "Search for nodes in the knowledge graph based on a query",
            {"query": str},
            {
                "query": _string(
                    "The search query to match against entity names, types, and observation content"
                )
            },
            _GRAPH,
            True,
            False,
            _search_nodes,
        ),
        Tool(
            "open_nodes",
            "Open Nodes",
            "Open specific nodes in the knowledge graph by their names",
            {"names": [str]},
            {"names": _array(_string(), "An array of entity names to retrieve")},
            _GRAPH,
            True,
            False,
            _open_nodes,
        ),
    )
}
