"""An output parser for tests of answer formats: `[think]`, `[call NAME]` and `[end]` in the text switch its kind."""

from __future__ import annotations

import re

from atom_cluster.api.answers.pieces import Piece, ReasoningPiece, TextPiece, ToolCallArguments, ToolCallBegun

_MARK = re.compile(r"\[(think|end|call (\w+))\]")


def pieces_of(text: str) -> list[Piece]:
    """The pieces that a text with marks stands for."""
    pieces: list[Piece] = []
    mode, num_calls = "text", 0
    position = 0
    for match in [*_MARK.finditer(text), None]:
        end = match.start() if match else len(text)
        content = text[position:end]
        if content and mode == "think":
            pieces.append(ReasoningPiece(content))
        elif content and mode == "call":
            pieces.append(ToolCallArguments(num_calls - 1, content))
        elif content:
            pieces.append(TextPiece(content))
        if match is None:
            break
        position = match.end()
        mode = match[1].split()[0] if match[1] != "end" else "text"
        if mode == "call":
            pieces.append(ToolCallBegun(num_calls, f"call-{num_calls}", match[2]))
            num_calls += 1
    return pieces
