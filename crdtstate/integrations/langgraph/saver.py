"""
A LangGraph checkpointer in replicated documents: runs on one thread merge instead of losing.

A checkpoint stores the channels that it changed, as deltas to its parent's, and names the others.
Where runs forked, because several went on from one checkpoint here or on replicas apart, reading
the latest one merges the `CrdtChannel` states of all heads, everywhere to the same; all other
channels are those of the newest. The next checkpoint of that run joins the heads for good. Going on
from an older checkpoint by its id is no accident: then it alone is the head.

A put is acknowledged when it is committed in the replica's store: a kill of the process loses
nothing of it, a power cut up to its last 0.1 s, or with ``durability="power"`` nothing either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from crdtstate import blocking
from crdtstate.document import check_name
from crdtstate.errors import InvalidUpdate, UsageError
from crdtstate.integrations.langgraph import threads
from crdtstate.integrations.langgraph.blobs import Cache
from crdtstate.integrations.langgraph.finding import field
from crdtstate.integrations.langgraph.home import Door, Home
from crdtstate.integrations.langgraph.merging import is_state, merge_states
from crdtstate.integrations.langgraph.threads import Record, Thread, Value, check_text
from crdtstate.replica import Replica

log = logging.getLogger("crdtstate")

PAGE = 32
"""Checkpoints that `list` reads at a time."""

WRITES_MAX = 10_000
"""Writes of one call of `put_writes`."""

_JOINS = "__crdtstate_joins"
"""In the config of a latest checkpoint: the heads that were merged in it, itself first."""

_FORKS = "__crdtstate_forks"
"""In the config of one that is no head and was asked for by its id: that id."""


class CrdtSaver(Door, BaseCheckpointSaver[int]):
    """A checkpointer: ``builder.compile(checkpointer=CrdtSaver(replica))``.

    Its ``a...`` methods can be awaited on any loop; the others are for threads that run none, or
    another one than the replica's.

    Args:
        replica: An open `Replica`, on its loop, or `blocking.Replica`; or a saver or store, to
            share theirs.
        serde: Turns values into bytes. The default restores plain types and those of LangChain and
            LangGraph only, since others may write what is read here; for classes of your own give
            ``JsonPlusSerializer(allowed_msgpack_modules=[("package.module", "Class")])``.

    Raises:
        UsageError: *replica* is none, or *serde* unpickles.
    """

    def __init__(
        self,
        replica: Replica | blocking.Replica | Door | Home,
        *,
        serde: SerializerProtocol | None = None,
    ) -> None:
        super().__init__(serde=serde or JsonPlusSerializer(allowed_msgpack_modules=None))
        for each in (self.serde, getattr(self.serde, "serde", None)):
            if getattr(each, "pickle_fallback", False):
                raise UsageError("pickle_fallback=True would let other members run code here")
        self.home = replica if isinstance(replica, Home) else Home.of(replica)
        self._cache = Cache()
        self._threads: dict[str, Thread] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        name: str = "langgraph",
        shared: bool = False,
        serde: SerializerProtocol | None = None,
        **options: Any,
    ) -> CrdtSaver:
        """A saver with a replica of its own: ``with CrdtSaver.open("agents.db") as saver``, or
        ``async with``.

        Args:
            path: The store; made on first use.
            name: The agent's name.
            shared: Whether several processes of this host may have the file open. Each put then
                goes through the one that keeps it, which costs about a millisecond.
            options: Those of `Replica`, such as ``peers``; or of `OneFile`.
        """
        return cls(Home.at(path, name, shared, options), serde=serde)

    # Reading

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that *config* names, or the latest one of its thread and namespace."""
        return self.home.run(self._get_tuple(config), "get_tuple")

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """See `get_tuple`."""
        return await self.home.arun(self._get_tuple(config), "get_tuple")

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, newest first: of a thread and namespace, or of all. *filter* compares
        metadata, by names or paths such as ``"user.id"``; *before* is another checkpoint's
        config."""
        found = self.home.run(self._find(config, before), "list")
        for at in range(0, len(found), PAGE):
            page = self.home.run(self._read_page(found[at : at + PAGE], filter), "list")
            for each in page:
                if limit is not None:
                    limit -= 1
                    if limit < 0:
                        return
                yield each

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """See `list`."""
        found = await self.home.arun(self._find(config, before), "list")
        for at in range(0, len(found), PAGE):
            page = await self.home.arun(self._read_page(found[at : at + PAGE], filter), "list")
            for each in page:
                if limit is not None:
                    limit -= 1
                    if limit < 0:
                        return
                yield each

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """What LangGraph's DeltaChannels are made of again: for each, the writes of the checkpoints
        before the one of *config*, oldest first, and the value that they begin with."""
        work = self._get_delta_channel_history(config, channels)
        return self.home.run(work, "get_delta_channel_history")

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """See `get_delta_channel_history`."""
        work = self._get_delta_channel_history(config, channels)
        return await self.home.arun(work, "get_delta_channel_history")

    # Writing

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint whose parent is the one that *config* names; return its own config.

        Raises:
            UsageError: A name or value cannot be stored; nothing was.
            StoreError: The store refuses to write.
        """
        return self.home.run(self._put(config, checkpoint, metadata, new_versions), "put")

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """See `put`."""
        return await self.home.arun(self._put(config, checkpoint, metadata, new_versions), "put")

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store what a task wrote on top of a checkpoint. Raises what `put` does."""
        self.home.run(self._put_writes(config, writes, task_id, task_path), "put_writes")

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """See `put_writes`."""
        await self.home.arun(self._put_writes(config, writes, task_id, task_path), "put_writes")

    # Deleting and copying

    def delete_thread(self, thread_id: str) -> None:
        """Delete all of a thread."""
        self.home.run(self._delete_thread(thread_id), "delete_thread")

    async def adelete_thread(self, thread_id: str) -> None:
        """See `delete_thread`."""
        await self.home.arun(self._delete_thread(thread_id), "delete_thread")

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of runs, in all threads."""
        self.home.run(self._delete_for_runs(run_ids), "delete_for_runs")

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """See `delete_for_runs`."""
        await self.home.arun(self._delete_for_runs(run_ids), "delete_for_runs")

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all of a thread to another; nothing if there is none."""
        self.home.run(self._copy_thread(source_thread_id, target_thread_id), "copy_thread")

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """See `copy_thread`."""
        await self.home.arun(self._copy_thread(source_thread_id, target_thread_id), "copy_thread")

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Keep only the latest checkpoint of each namespace, with what it merges of other heads
        and needs of those before; or with *strategy* "delete" none.

        Raises:
            UsageError: There is no such strategy.
        """
        self.home.run(self._prune(thread_ids, strategy), "prune")

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """See `prune`."""
        await self.home.arun(self._prune(thread_ids, strategy), "prune")

    # On the replica's loop: reading

    async def _get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        thread_id, namespace, id = _place(config)
        await self.home.current(threads.document_name(thread_id))
        thread = self._thread(thread_id)
        if thread is None:
            return None
        token = threads.token_of(namespace)
        if id is None:
            return self._latest(thread, token, namespace)
        found = self._read(thread, token, namespace, id)
        if found is None:
            return None
        given = config["configurable"]
        place: dict[str, Any] = dict(_config(thread_id, namespace, id)["configurable"])
        if id not in thread.document.map(f"h/{token}"):
            place[_FORKS] = id
        elif _FORKS in given:
            place[_FORKS] = ""
        if _JOINS in given:
            # What an earlier read of the latest said is not to be taken over.
            place[_JOINS] = []
        return found._replace(config={"configurable": place})

    def _latest(self, thread: Thread, token: str, namespace: str) -> CheckpointTuple | None:
        """The newest head, with what the others say in channels that merge."""
        found: CheckpointTuple | None = None
        joins: list[str] = []
        for id in thread.heads(token):
            if found is None:
                found = self._read(thread, token, namespace, id)
                if found is not None:
                    joins.append(id)
            elif (record := thread.record(token, id)) is not None:
                if self._join(thread, found.checkpoint, record):
                    joins.append(id)
        if found is not None and len(joins) > 1:
            found.config["configurable"][_JOINS] = joins
        return found

    def _join(self, thread: Thread, checkpoint: Checkpoint, record: Record) -> bool:
        """Merge what another head says into a checkpoint; False if that cannot be read."""
        values, versions = checkpoint["channel_values"], checkpoint["channel_versions"]
        try:
            theirs = {
                name: self._loads(value.type, thread.load(value.ref))
                for name, value in record.channels.items()
                if value.merges
            }
            merged = {
                name: merge_states([state, values[name]] if is_state(values.get(name)) else [state])
                for name, state in theirs.items()
                if is_state(state)
            }
            known = self._loads_dict(*record.body)["channel_versions"] if merged else {}
        except (KeyError, InvalidUpdate) as exc:
            log.warning("thread %r: a head that cannot be merged: %s", thread.id, exc)
            return False
        values.update(merged)
        for name in merged:
            mine: Any = versions.get(name)
            version = known.get(name) or 1
            if mine is None or (type(mine) is type(version) and mine < version):
                versions[name] = version
        return True

    def _read(self, thread: Thread, token: str, namespace: str, id: str) -> CheckpointTuple | None:
        """A checkpoint, unless it is not here, or somebody has deleted a part of it."""
        record = thread.record(token, id)
        if record is None:
            return None
        try:
            found = {
                name: (value.type, thread.load(value.ref))
                for name, value in record.channels.items()
            }
            written = [
                (task, channel, (type_, thread.load(ref)))
                for _, task, _, channel, type_, ref in thread.writes(token, id)
            ]
        except (KeyError, InvalidUpdate) as exc:
            log.warning("thread %r: checkpoint %s is not whole: %s", thread.id, id, exc)
            return None
        checkpoint: Any = self._loads_dict(*record.body)
        checkpoint["channel_values"] = {name: self._loads(*typed) for name, typed in found.items()}
        writes = [(task, channel, self._loads(*typed)) for task, channel, typed in written]
        return CheckpointTuple(
            _config(thread.id, namespace, id),
            checkpoint,
            cast(CheckpointMetadata, self._loads_dict(*record.metadata)),
            _config(thread.id, namespace, record.parent) if record.parent else None,
            writes,
        )

    async def _find(
        self, config: RunnableConfig | None, before: RunnableConfig | None
    ) -> Sequence[tuple[str, str, str]]:
        """The checkpoints that `list` asks for: id, thread, token, newest first."""
        below = None if before is None else before["configurable"].get("checkpoint_id")
        given = {} if config is None else config["configurable"]
        if "thread_id" in given:
            thread_id, namespace, id = _place(cast(RunnableConfig, config))
            await self.home.current(threads.document_name(thread_id))
            thread = self._thread(thread_id)
            found = [] if thread is None else [thread]
        else:
            found, namespace, id = list(self._all_threads()), given.get("checkpoint_ns", ""), None
        has_namespace = "checkpoint_ns" in given
        places = [
            (each, thread.id, token)
            for thread in found
            for token in ([threads.token_of(namespace)] if has_namespace else thread.namespaces())
            for each in ([id] if id is not None else thread.checkpoints(token))
            if below is None or each < below
        ]
        return sorted(places, key=lambda place: place[0], reverse=True)

    async def _read_page(
        self, places: Sequence[tuple[str, str, str]], filter: dict[str, Any] | None
    ) -> Sequence[CheckpointTuple]:
        page = []
        for id, thread_id, token in places:
            thread = self._thread(thread_id)
            record = None if thread is None else thread.record(token, id)
            if thread is None or record is None:
                continue
            if filter:
                metadata = self._loads_dict(*record.metadata)
                if any(field(metadata, key) != value for key, value in filter.items()):
                    continue
            found = self._read(thread, token, _namespace(record, token), id)
            if found is not None:
                page.append(found)
        return page

    async def _get_delta_channel_history(
        self, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        thread_id, namespace, id = _place(config)
        await self.home.current(threads.document_name(thread_id))
        found: dict[str, DeltaChannelHistory] = {name: {"writes": []} for name in channels}
        thread, token = self._thread(thread_id), threads.token_of(namespace)
        if thread is None:
            return found
        if id is None:
            latest = self._latest(thread, token, namespace)
            id = None if latest is None else latest.checkpoint["id"]
        record = None if id is None else thread.record(token, id)
        wanted, passed = set(channels), {id}
        while wanted and record is not None and (at := record.parent) not in passed:
            # Whoever wrote the records may have made a circle of them.
            passed.add(at)
            record = thread.record(token, at) if at is not None else None
            if at is None or record is None:
                break
            try:
                for _, task, _, name, type_, ref in reversed(thread.writes(token, at)):
                    if name in wanted:
                        value = self._loads(type_, thread.load(ref))
                        found[name]["writes"].append((task, name, value))
                for name in wanted & record.channels.keys():
                    seed = record.channels[name]
                    found[name]["seed"] = self._loads(seed.type, thread.load(seed.ref))
                    wanted.discard(name)
            except KeyError as exc:
                raise InvalidUpdate(f"checkpoint {at} of thread {thread_id!r}: {exc} gone") from exc
        for history in found.values():
            history["writes"].reverse()
        return found

    def _loads(self, type_: str, data: bytes) -> Any:
        """A value, from bytes that may be anybody's.

        Raises:
            InvalidUpdate: The serializer cannot read them: a wrong key, perhaps. It is not said
                that there is no checkpoint, as an agent would begin anew.
        """
        try:
            return self.serde.loads_typed((type_, data))
        except Exception as exc:
            raise InvalidUpdate(
                f"the serializer cannot read a {type_!r} of a checkpoint ({exc}); is it the one "
                "that wrote it?"
            ) from exc

    def _loads_dict(self, type_: str, data: bytes) -> dict[str, Any]:
        found = self._loads(type_, data)
        if not isinstance(found, dict):
            raise InvalidUpdate("a checkpoint whose body or metadata is no dict")
        return found

    # On the replica's loop: writing

    async def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        thread_id, namespace, parent = _place(config)
        id = check_text(checkpoint["id"], "a checkpoint's id", threads.ID_CHARS_MAX)
        token = threads.token_of(namespace)
        thread = self._thread(thread_id, make=True)
        assert thread is not None
        superseded, before = [parent] if parent else [], None
        if parent and config["configurable"].get(_FORKS) == parent:
            superseded = thread.heads(token)
        elif parent and parent in thread.document.map(f"h/{token}"):
            # What others than a head need may be deleted elsewhere at this moment.
            before = thread.record(token, parent)
        joins = [each for each in config["configurable"].get(_JOINS) or () if type(each) is str]
        joins = joins if joins[:1] == [parent] else []
        pieces: dict[str, Any] = {}
        channels = {}
        for name, value in checkpoint["channel_values"].items():
            old = None if before is None else before.channels.get(name)
            merges = is_state(value)
            # In a checkpoint that joins heads, what merges is new whatever its version says.
            is_same = old is not None and name not in new_versions and not (merges and joins)
            if is_same and old is not None and thread.has(old.ref):
                channels[name] = old
                continue
            type_, data = self.serde.dumps_typed(value)
            previous = old.ref if old is not None and isinstance(old.ref, str) else None
            ref = thread.store(data, previous, threads.INLINE_BYTES, pieces)
            channels[name] = Value(type_, ref, merges)
        body = {key: value for key, value in checkpoint.items() if key != "channel_values"}
        told = get_checkpoint_metadata(config, metadata)
        run = told.get("run_id")
        record = Record(
            None if threads.thread_of(thread.document.name) else thread_id,
            None if token == namespace else namespace,
            parent,
            run if isinstance(run, str) else None,
            self.serde.dumps_typed(told),
            self.serde.dumps_typed(body),
            channels,
        )
        pieces = self._put_large(thread, pieces)
        with self.home.replica.transaction():
            thread.pieces.update(pieces)
            thread.put(token, id, record, [*superseded, *joins])
        thread.writing.clear()
        await self.home.saved()
        return _config(thread_id, namespace, id)

    async def _put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> None:
        thread_id, namespace, id = _place(config)
        if id is None:
            raise UsageError("put_writes needs the checkpoint_id that the writes build on")
        if len(writes) > WRITES_MAX:
            raise UsageError(f"{len(writes)} writes at once; {WRITES_MAX} is the limit")
        check_text(task_id, "a task's id", threads.ID_CHARS_MAX)
        thread = self._thread(thread_id, make=True)
        assert thread is not None
        token = threads.token_of(namespace)
        present = thread.document.map(f"w/{token}/{id}")
        pieces: dict[str, Any] = {}
        dumped = {}
        for index, (channel, value) in enumerate(writes):
            at = WRITES_IDX_MAP.get(channel, index)
            key = f"{task_id}/{at}"
            # A task may be done again after a crash; what it wrote first counts.
            if at < 0 or key not in present:
                dumped[key] = (channel, *self.serde.dumps_typed(value))
        is_small = sum(len(data) for _, _, data in dumped.values()) <= threads.TOGETHER_BYTES
        inline = threads.WRITE_INLINE_BYTES if is_small else threads.INLINE_BYTES
        packed = {
            key: [task_path, channel, type_, thread.store(data, None, inline, pieces)]
            for key, (channel, type_, data) in dumped.items()
        }
        pieces = self._put_large(thread, pieces)
        with self.home.replica.transaction():
            thread.pieces.update(pieces)
            thread.put_writes(token, id, packed)
        await self.home.saved()

    def _put_large(self, thread: Thread, pieces: dict[str, Any]) -> dict[str, Any]:
        """Write pieces that are too large to go together with what names them; return the rest.

        Raises:
            UsageError: The thread is full; nothing was written.
        """
        thread.check_room(pieces)
        if sum(map(threads.size_of, pieces.values())) <= threads.TOGETHER_BYTES:
            return pieces
        for key, piece in pieces.items():
            thread.pieces[key] = piece
        return {}

    async def _delete_thread(self, thread_id: str) -> None:
        thread = self._thread(_thread_id(thread_id))
        if thread is not None:
            thread.clear()
            await self.home.saved()

    async def _delete_for_runs(self, run_ids: Sequence[str]) -> None:
        runs = set(run_ids)
        if not runs:
            return
        for thread in list(self._all_threads()):
            has_changed = False
            for token in thread.namespaces():
                records = ((id, thread.record(token, id)) for id in thread.checkpoints(token))
                gone = [id for id, record in records if record is not None and record.run in runs]
                if gone:
                    thread.drop(token, gone)
                    has_changed = True
            if has_changed:
                thread.sweep(self.home.replica.wall_ms())
        await self.home.saved()

    async def _copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        source = self._thread(_thread_id(source_thread_id))
        if source is None or not source.namespaces():
            return
        target = self._thread(_thread_id(target_thread_id), make=True)
        assert target is not None
        if source is target:
            return
        target.writing.update(source.pieces)
        for count, _ in enumerate(source.copy_to(target)):
            if count % 256 == 255:
                await asyncio.sleep(0)
        target.writing.clear()
        await self.home.saved()

    async def _prune(self, thread_ids: Sequence[str], strategy: str) -> None:
        if strategy not in ("keep_latest", "delete"):
            raise UsageError(f'prune knows "keep_latest" and "delete", not {strategy!r}')
        for thread_id in thread_ids:
            if strategy == "delete":
                await self._delete_thread(thread_id)
                continue
            thread = self._thread(_thread_id(thread_id))
            if thread is None:
                continue
            spared: set[str] = set()
            for token in thread.namespaces():
                spared |= self._keep_latest(thread, token)
            thread.sweep(self.home.replica.wall_ms(), spared)
        await self.home.saved()

    def _keep_latest(self, thread: Thread, token: str) -> set[str]:
        """Drop all checkpoints of a namespace but the latest one and those that it needs. Returns
        the pieces that runs may build on that go on from other heads at this moment."""
        spared: set[str] = set()
        for id in thread.heads(token):
            if (record := thread.record(token, id)) is not None:
                spared |= thread.needs(record)
        latest = self._latest(thread, token, "")
        if latest is None:
            return spared
        id = latest.checkpoint["id"]
        joins = latest.config["configurable"].get(_JOINS, ())
        if joins:
            self._fold(thread, token, id, latest.checkpoint)
        kept = {id, *self._delta_ancestors(thread, token, latest)}
        thread.drop(token, [each for each in thread.checkpoints(token) if each not in kept])
        return spared

    def _fold(self, thread: Thread, token: str, id: str, merged: Checkpoint) -> None:
        """Write what was merged into the checkpoint itself, before the other heads go."""
        record = thread.record(token, id)
        assert record is not None, "it was read just now"
        pieces: dict[str, Any] = {}
        channels = dict(record.channels)
        for name, value in merged["channel_values"].items():
            if is_state(value):
                type_, data = self.serde.dumps_typed(value)
                ref = thread.store(data, None, threads.INLINE_BYTES, pieces)
                channels[name] = Value(type_, ref, True)
        body = {key: value for key, value in merged.items() if key != "channel_values"}
        record = record._replace(body=self.serde.dumps_typed(body), channels=channels)
        pieces = self._put_large(thread, pieces)
        with self.home.replica.transaction():
            thread.pieces.update(pieces)
            thread.put(token, id, record, ())

    def _delta_ancestors(self, thread: Thread, token: str, kept: CheckpointTuple) -> set[str]:
        """The checkpoints before one from whose writes LangGraph's DeltaChannels are made again:
        back to where each of them has a value."""
        counted = kept.metadata.get("counters_since_delta_snapshot") or {}
        wanted = set(counted) - set(kept.checkpoint["channel_values"])
        found: set[str] = set()
        at = None if kept.parent_config is None else kept.parent_config["configurable"]
        id = None if at is None else at["checkpoint_id"]
        while wanted and id is not None and id not in found:
            record = thread.record(token, id)
            if record is None:
                break
            found.add(id)
            wanted -= set(record.channels)
            id = record.parent
        return found

    # Threads

    def _thread(self, id: str, *, make: bool = False) -> Thread | None:
        """The thread *id*, if it has a document or is to get one."""
        name = threads.document_name(id)
        replica = self.home.replica
        document = replica.find(name)
        if document is None:
            if not make:
                return None
            document = replica.document(check_name(name, "a thread's document"))
        known = self._threads.get(name)
        if known is None or known.document is not document:
            known = self._threads[name] = Thread(id, document, self._cache)
        return known

    def _all_threads(self) -> Iterator[Thread]:
        """All threads that have checkpoints."""
        for name in self.home.replica.documents():
            if name.startswith(threads.PREFIX):
                id = threads.thread_of(name) or self._thread_named_in(name)
                if id is not None and (thread := self._thread(id)) is not None:
                    yield thread

    def _thread_named_in(self, name: str) -> str | None:
        """The id of a thread whose document's name is a hash, as its checkpoints say it."""
        document = self.home.replica.find(name)
        assert document is not None
        thread = Thread("", document, self._cache)
        for token in thread.namespaces():
            for id in thread.checkpoints(token):
                record = thread.record(token, id)
                if record is not None and record.thread is not None:
                    if threads.document_name(record.thread) == name:
                        return record.thread
        return None


def _place(config: RunnableConfig) -> tuple[str, str, str | None]:
    """The thread, the namespace and the checkpoint that a config names.

    Raises:
        UsageError: It names no thread, or something that cannot be a name.
    """
    given = config.get("configurable") or {}
    if given.get("thread_id") is None:
        raise UsageError('config needs a thread: {"configurable": {"thread_id": "..."}}')
    thread = _thread_id(given["thread_id"])
    namespace = given.get("checkpoint_ns") or ""
    check_text(namespace, "a checkpoint_ns", threads.NAMESPACE_CHARS_MAX, empty=True)
    id = given.get("checkpoint_id") or None
    if id is not None:
        check_text(id, "a checkpoint_id", threads.ID_CHARS_MAX)
    return thread, namespace, id


def _thread_id(given: object) -> str:
    text = str(given) if type(given) is int else given
    return check_text(text, "a thread_id", threads.THREAD_CHARS_MAX)


def _config(thread: str, namespace: str, id: str) -> RunnableConfig:
    place = {"thread_id": thread, "checkpoint_ns": namespace, "checkpoint_id": id}
    return {"configurable": place}


def _namespace(record: Record, token: str) -> str:
    return token if record.namespace is None else record.namespace
