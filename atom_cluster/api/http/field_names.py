"""Errors about fields of a chat request, told to clients whose endpoint calls those fields something else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from atom_cluster.errors import InvalidRequest

_QUOTED = re.compile(r"`([A-Za-z_][^`]*)`")


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Raise each `InvalidRequest` again with the names that the client used.

    `names`: from a chat request's field to the client's. What lies within a field that has another name there is left
    out, since it need not have the same shape. Names that begin with a dot are of what lies within the other fields.
    """

    def renamed(path: str) -> str:
        root = re.split(r"[.\[]", path, maxsplit=1)[0]
        if root in names:
            return names[root]
        for inner, shown in names.items():
            path = path.replace(inner, shown) if inner.startswith(".") else path
        return path

    try:
        yield
    except InvalidRequest as exc:
        if exc.param is not None:
            exc.param = renamed(exc.param)
        exc.args = (_QUOTED.sub(lambda match: f"`{renamed(match[1])}`", str(exc)),)
        raise
