"""Check a claim where it is made, and show the figures if it is false."""

import ast
import sys
from contextlib import suppress
from types import FrameType

from executing import Source


def check(claim: str, holds: bool) -> None:
    """Print the claim with a tick, or raise an error that shows the figures.

        check("two calls were in flight at once", run.peak_in_flight == 2)

    Raises AssertionError if `holds` is false. Its message contains the condition
    as written, and the value of each name and item in it. Nothing in the condition
    is called a second time, except `len`.
    """
    if holds:
        print(f"✓ {claim}")
        return
    raise AssertionError(f"✗ {claim}{_figures(sys._getframe(1))}")


def _figures(caller: FrameType) -> str:
    """The condition that the caller wrote, and the values in it."""
    call = Source.executing(caller).node
    if not isinstance(call, ast.Call):
        return ""
    condition = [*call.args, *(keyword.value for keyword in call.keywords)][1]
    lines = [f"\n  not true: {ast.unparse(condition)}"]
    inner = {
        ast.unparse(name)
        for part in ast.walk(condition)
        if isinstance(part, ast.comprehension)
        for name in ast.walk(part.target)
    }
    for node in ast.walk(condition):
        shown = isinstance(node, ast.Name | ast.Attribute | ast.Subscript)
        if (shown or _is_len(node)) and _is_repeatable(node, inner):
            source = ast.unparse(node)
            with suppress(Exception):  # such as an await, or a lambda's argument
                value = eval(source, caller.f_globals, caller.f_locals)
                if isinstance(value, int | float | str):
                    lines.append(f"\n  {source} = {value!r}")
    return "".join(dict.fromkeys(lines))


def _is_len(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "len"


def _is_repeatable(node: ast.AST, inner: set[str]) -> bool:
    """Whether evaluating it again calls nothing but len and gives the same value."""
    return not any(
        (isinstance(part, ast.Call | ast.NamedExpr) and not _is_len(part))
        or (isinstance(part, ast.Name) and part.id in inner)
        for part in ast.walk(node)
    )
