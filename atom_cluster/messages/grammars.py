"""Grammars that ranks hold: an engine has them compiled beside its steps, and plans no sample before they are there.

Every rank compiles for itself, on a thread of its own. The engine names a grammar by an id, says when it is to be
compiled and when it is not needed any more, and hears once of each when it is there on every rank, or why not.
"""

from __future__ import annotations

from msgspec import Struct

from atom_cluster.messages.requests import GrammarSpec

# --- engine -> ranks, inside a StepPlan ---------------------------------------------------------------------------


class CompileGrammar(Struct, frozen=True, kw_only=True, tag="compile_grammar"):
    """Compile and hold a grammar. Ends, however it ends, with one `GrammarReady`."""

    grammar_id: int
    """Used once in the life of an engine."""
    spec: GrammarSpec
    """`after` means nothing here: it is the row's."""


class ForgetGrammar(Struct, frozen=True, kw_only=True, tag="forget_grammar"):
    """No row of this plan or a later one needs the grammar. If its compilation has not begun, it will not."""

    grammar_id: int


GrammarCommand = CompileGrammar | ForgetGrammar


# --- ranks -> engine ----------------------------------------------------------------------------------------------


class GrammarReady(Struct, frozen=True, kw_only=True, tag="grammar_ready"):
    """Answer to `CompileGrammar`, combined over ranks: rows with this grammar may sample."""

    grammar_id: int
    error: str | None = None
    """Why it could not be compiled, on the first rank where it could not."""
