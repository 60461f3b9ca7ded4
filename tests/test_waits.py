"""Every wait for something outside has a bound.

What may wait for ever is listed with the reason; the list fails when an entry is not needed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from tests.framework import sources

# Calls that wait, and what makes one of them bounded: a positional bound or one of these names.
_BOUNDS = {"timeout", "timeout_s", "bound_s", "bound"}
_WAITS = {"result", "wait", "join", "acquire", "communicate"}
_PROCESSES = {"run", "call", "check_call", "check_output"}
# Of asyncio: the wait itself is bounded by what is around it.
_BOUNDING = {"wait_for", "timeout", "move_on_after", "fail_after", "create_task", "shield"}

# (file:function, call): why it may wait for as long as it takes.
ALLOWED: dict[tuple[str, str], str] = {
    ("daemon/server.py:_stop_on", "asyncio.wait"): "its home opens, or it is told to stop",
    ("daemon/state.py:close", "closing.result"): "it is in `done`",
    ("daemon/exec_stream.py:_pump", "asyncio.wait"): "a command runs for as long as it likes",
    ("daemon/exec_stream.py:_pump", "output.result"): "it is in `done`",
    ("daemon/exec_stream.py:_pump", "task.result"): "it is in `done`",
    ("daemon/exec_stream.py:_feed_stdin", "queue.get"): "a client types when it likes",
    ("guest/console.py:__aiter__", "self._changed.wait"): "a console is silent when it likes",
    ("guest/session.py:__anext__", "self._arrived.wait"): "a command is silent when it likes",
    ("guest/session.py:_may_write", "self._credited.wait"): "a command reads when it likes",
    ("guest/outbox.py:wait_for_room", "self._room.wait"): "a link that ends wakes it",
    ("cli/copying.py:join", "self._thread.join"): "it ends with its pipe, which is closed",
    ("cli/copying.py:_wait_for", "work.join"): "the same",
    ("cli/stream_writer.py:finish", "self._thread.join"): "stdout's reader reads when it likes",
}


@dataclass(frozen=True)
class Wait:
    """A call that may wait, where it stands, and its line."""

    place: str
    call: str
    line: int

    @property
    def key(self) -> tuple[str, str]:
        return (self.place, self.call)


def test_every_wait_has_a_bound() -> None:
    """Threads, processes, futures and locks, in all of the package."""
    found = list(_unbounded())
    new = [wait for wait in found if wait.key not in ALLOWED]
    assert new == [], "give them a bound, or say in ALLOWED why they have none"
    assert set(ALLOWED) - {wait.key for wait in found} == set(), "not needed any more"


def test_the_search_finds_what_it_is_for() -> None:
    """A search that finds nothing proves nothing."""
    code = """
def f():
    a.result(); b.wait(); c.join(); d.acquire(); e.communicate()
    subprocess.run(["x"]); queue.get()
    a.result(3); b.wait(timeout=3); ",".join(x); subprocess.run(["x"], timeout=1); d.get("k")
    os.path.join(a, b); c.acquire(timeout=2); queue.get(timeout=1)
async def g():
    await asyncio.wait_for(b.wait(), 3)
    await b.wait()
"""
    calls = [wait.call for wait in _of_tree(ast.parse(code), "x.py")]
    assert sorted(calls) == sorted(
        ["a.result", "b.wait", "c.join", "d.acquire", "e.communicate", "subprocess.run",
         "queue.get", "b.wait"]
    )  # fmt: skip


def test_every_socket_has_a_bound() -> None:
    """A module that makes sockets gives each a timeout, or hands it to the event loop."""
    lacking = []
    for path in sources.package_files():
        text = path.read_text()
        makes = "socket.socket(" in text or "socketpair(" in text
        if makes and not any(
            bound in text for bound in ("settimeout(", "setblocking(False)", "listen(")
        ):
            lacking.append(sources.relative(path))
    assert lacking == []


def _unbounded() -> Iterator[Wait]:
    for path in sources.package_files():
        name = sources.relative(path).removeprefix("src/diapause/")
        yield from _of_tree(sources.tree(path), name)


def _of_tree(tree: ast.Module, name: str) -> Iterator[Wait]:
    bounded = {
        id(inner)
        for node in ast.walk(tree)
        if _bounds(node)
        for inner in ast.walk(node)
        if inner is not node
    }
    for function in _functions(tree):
        for node in _own_nodes(function):
            if isinstance(node, ast.Call) and id(node) not in bounded and _is_unbounded(node):
                yield Wait(f"{name}:{function.name}", ast.unparse(node.func), node.lineno)


def _bounds(node: ast.AST) -> bool:
    """A call that bounds what it is given, or a block under such a call."""
    if isinstance(node, ast.With | ast.AsyncWith):
        return any(_bounds(item.context_expr) for item in node.items)
    return isinstance(node, ast.Call) and _last(node.func) in _BOUNDING


def _is_unbounded(call: ast.Call) -> bool:
    name, owner = _last(call.func), _owner(call.func)
    named = {keyword.arg for keyword in call.keywords}
    if named & _BOUNDS:
        return False
    if owner == "subprocess":
        return name in _PROCESSES
    if owner == "asyncio":
        return name == "wait"
    if name == "get":
        return not call.args and "queue" in owner
    if name == "join" and isinstance(call.func, ast.Attribute):
        return not call.args and not isinstance(call.func.value, ast.Constant)
    if name == "communicate":
        return True
    return name in _WAITS and isinstance(call.func, ast.Attribute) and not call.args


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Without those of functions inside, which are found by themselves."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        yield from _own_nodes(child)


def _last(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _owner(function: ast.expr) -> str:
    return ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
