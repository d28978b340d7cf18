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
    as written, and the value of each name and item in it.
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
    for node in ast.walk(condition):
        counted = isinstance(node, ast.Call) and ast.unparse(node.func) == "len"
        if counted or isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
            source = ast.unparse(node)
            with suppress(Exception):  # names from an inner scope have no value here
                value = eval(source, caller.f_globals, caller.f_locals)
                if isinstance(value, int | float | str):
                    lines.append(f"\n  {source} = {value!r}")
    return "".join(dict.fromkeys(lines))
