"""Where chat templates run: they see the conversation and nothing else, and they come to an end.

Jinja's sandbox keeps a template from attributes that lead to Python, from files (there is no loader) and from long ranges. Here it also
counts rounds of loops and calls of macros, and refuses products that would fill the memory.
"""

import operator
from collections.abc import Sized
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

MOST_ROUNDS = 1_000_000
"""Of a rendering; a conversation of 1,000 messages takes some thousands, and a million take three seconds."""
MOST_CHARACTERS = 1 << 28
LARGEST_POWER = 64


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with bounds; `start` a rendering before each."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._rounds = 0
        del self.globals["lipsum"]  # makes as much text as it is told to

    def start(self) -> None:
        """Count from here on."""
        self._rounds = 0

    def call_binop(self, context: Any, operator_sign: str, left: Any, right: Any) -> Any:
        """A product or a power, if it is not too large."""
        for one, other in ((left, right), (right, left)):
            if operator_sign == "*" and isinstance(one, Sized) and isinstance(other, int) and len(one) * other > MOST_CHARACTERS:
                raise jinja2.TemplateError(f"it repeats something {other} times")
        if operator_sign == "**" and abs(right) > LARGEST_POWER:
            raise jinja2.TemplateError(f"it raises a number to the power of {right}")
        return operator.mul(left, right) if operator_sign == "*" else left**right

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        repeated: jinja2.nodes.For | jinja2.nodes.Macro
        for repeated in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro)):  # type: ignore[assignment]  # as it was asked for
            count = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("count_round"), [], [], None, None)  # which no template can name
            repeated.body.insert(0, jinja2.nodes.ExprStmt(count).set_lineno(repeated.lineno))
        return tree

    def count_round(self) -> None:
        """What the body of each loop and macro begins with."""
        self._rounds += 1
        if self._rounds > MOST_ROUNDS:
            raise jinja2.TemplateError(f"its loops and macros have gone {MOST_ROUNDS} rounds without an end")
