"""The lineage of snapshots as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diapause.model import SnapshotDetail

Node = dict[str, Any]


def lineage(snapshots: Sequence[SnapshotDetail]) -> list[Node]:
    """The snapshots without a parent that is there, each with its children, oldest first."""
    nodes: dict[str, Node] = {
        one.id: {
            "id": one.id, "name": one.name, "sandbox": one.sandbox, "state": one.state,
            "parent": one.parent, "created_at": one.created_at, "children": [],
        }
        for one in snapshots
    }  # fmt: skip
    roots: list[Node] = []
    for node in nodes.values():
        above = nodes.get(node["parent"] or "")
        (roots if above is None else above["children"]).append(node)
    return roots


def tree_lines(roots: Sequence[Node]) -> Iterator[str]:
    """One line a snapshot, with rules to its parent's; without recursion, as lineages are long."""
    waiting = [(node, "", "") for node in reversed(roots)]
    while waiting:
        node, before, below = waiting.pop()
        name = f" {node['name']}" if node["name"] else ""
        lost = " (its parent was removed)" if not before and node["parent"] else ""
        yield f"{before}{node['id']}{name}  {node['state']}  of {node['sandbox']}{lost}"
        children = node["children"]
        for place, child in reversed(list(enumerate(children))):
            last = place == len(children) - 1
            mark, rule = ("└─ ", "   ") if last else ("├─ ", "│  ")
            waiting.append((child, below + mark, below + rule))
