"""From a recorded command to the folders that a power cut at any moment could leave.

What was synced is there. Of everything else, any part may be: the bytes of a file that was not synced are old, zero or
new, and of the names that were added to a folder or removed from it since it was synced, any may be there or not.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Node = tuple[int, int]  # an inode, and how often its number has been used
Names = Mapping[str, Node]
Image = dict[str, bytes | None]  # content by path, None for a folder

_NOT_THERE = object()


@dataclass
class _Folder:
    durable: Names  # as of its last sync
    now: Names
    changes: list[tuple[Names, Names]] = field(default_factory=list)  # removed and added names since, one per step


class Moment:
    """The state of the disk before an event."""

    def __init__(self, event: str, path: str, root: Node, contents: Path) -> None:
        self.event = event
        self.path = path
        self._root = root
        self._contents = contents
        self._folders: dict[Node, tuple[Names, Names, tuple[tuple[Names, Names], ...]]] = {}
        self._live: dict[Node, str] = {}
        self._durable: dict[Node, str] = {}

    def freeze(self, folders: Mapping[Node, _Folder], live: Mapping[Node, str], durable: Mapping[Node, str]) -> Moment:
        """Keep the state of a replay."""
        self._folders = {node: (one.durable, one.now, tuple(one.changes)) for node, one in folders.items()}
        self._live, self._durable = dict(live), dict(durable)
        return self

    def live(self) -> Image:
        """What the running system sees."""
        return dict(self._walk(self._root, "", lambda folder: folder[1], self._live_bytes))

    def least(self) -> Image:
        """Only what was synced."""
        return dict(self._walk(self._root, "", lambda folder: folder[0], self._durable_bytes))

    def synced(self) -> Image:
        """All names, and of each file what was synced."""
        return dict(self._walk(self._root, "", lambda folder: folder[1], self._durable_bytes))

    def names_only(self) -> Image:
        """All names, and zeros in the files that were not synced."""
        return dict(self._walk(self._root, "", lambda folder: folder[1], self._zeroed))

    def mixed(self, chance: random.Random) -> Image:
        """A random part of what was not synced."""

        def names(folder: tuple[Names, Names, tuple[tuple[Names, Names], ...]]) -> Names:
            listed = dict(folder[0])
            for removed, added in folder[2]:
                if chance.random() < 0.5:
                    for name, node in removed.items():
                        if listed.get(name) == node:
                            del listed[name]
                    listed |= added
            return listed

        def content(node: Node) -> bytes:
            return chance.choice((self._durable_bytes, self._zeroed, self._live_bytes))(node)

        return dict(self._walk(self._root, "", names, content))

    def _walk(self, folder: Node, prefix: str, names: Any, content: Any) -> Iterator[tuple[str, bytes | None]]:
        for name, node in names(self._folders[folder]).items():
            if node in self._folders:
                yield f"{prefix}{name}", None
                yield from self._walk(node, f"{prefix}{name}/", names, content)
            else:
                yield f"{prefix}{name}", content(node)

    def _read(self, digest: str | None) -> bytes:
        return b"" if digest is None else _read(self._contents / digest)

    def _live_bytes(self, node: Node) -> bytes:
        return self._read(self._live.get(node, self._durable.get(node)))

    def _durable_bytes(self, node: Node) -> bytes:
        return self._read(self._durable.get(node))

    def _zeroed(self, node: Node) -> bytes:
        live = self._live.get(node, self._durable.get(node))
        return self._read(live) if live == self._durable.get(node) else bytes(len(self._read(live)))


@functools.lru_cache(maxsize=2_000)
def _read(path: Path) -> bytes:
    return path.read_bytes()


def moments(folder: Path) -> list[Moment]:
    """Return the recorded states in their order. What is there at the beginning counts as synced."""
    rows = [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
    replay = _Replay(folder / "contents")
    return [replay.step(row) for row in rows]


class _Replay:
    def __init__(self, contents: Path) -> None:
        self._contents = contents
        self._uses: dict[int, int] = {}
        self._present: set[int] = set()
        self._folders: dict[Node, _Folder] = {}
        self._live: dict[Node, str] = {}
        self._durable: dict[Node, str] = {}
        self._begun = False

    def step(self, row: dict[str, Any]) -> Moment:
        present = {row["root"], *(inode for inode, _ in row["tree"].values())}
        for inode in present - self._present:
            self._uses[inode] = self._uses.get(inode, 0) + 1
        self._present = present
        root = self._node(row["root"])
        listings: dict[Node, dict[str, Node]] = {root: {}}
        at = {"": root}
        self._live = {}
        for path, (inode, content) in row["tree"].items():
            node = at[path] = self._node(inode)
            parent, _, name = path.rpartition("/")
            listings[at[parent]][name] = node
            if content is None:
                listings[node] = {}
            else:
                self._live[node] = content
        for node, now in listings.items():
            self._update(node, now)
        if not self._begun:
            self._begun = True
            self._durable = dict(self._live)
            for folder in self._folders.values():
                folder.durable, folder.changes = folder.now, []
        if row["synced"]:
            self._sync(*row["synced"])
        return Moment(row["event"], row["path"], root, self._contents).freeze(self._folders, self._live, self._durable)

    def _node(self, inode: int) -> Node:
        return inode, self._uses.get(inode, 0)

    def _update(self, node: Node, now: Names) -> None:
        folder = self._folders.setdefault(node, _Folder({}, {}))
        before = folder.now
        if now != before:
            removed = {name: node for name, node in before.items() if now.get(name, _NOT_THERE) != node}
            added = {name: node for name, node in now.items() if before.get(name, _NOT_THERE) != node}
            folder.now = now
            folder.changes.append((removed, added))

    def _sync(self, inode: int, synced: Any) -> None:
        node = self._node(inode)
        if isinstance(synced, str):
            self._durable[node] = synced
        elif node in self._folders:
            folder = self._folders[node]
            folder.durable, folder.changes = {name: self._node(one) for name, one in synced.items()}, []
