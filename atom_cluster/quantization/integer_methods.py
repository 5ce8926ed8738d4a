"""quant_method `awq` and `gptq`."""

from __future__ import annotations

import re

from atom_cluster.quantization.awq import Awq
from atom_cluster.quantization.gptq import Gptq
from atom_cluster.quantization.rules import ConfigSection, SchemeRules, all_but, excluded_by, require_flag

_EXCLUDES, _CHANGES = "-:", "+:"


def read_awq(section: ConfigSection) -> SchemeRules:
    """All layers but `modules_to_not_convert`, with zero points."""
    section.require("bits", 4)
    section.require("version", "gemm", "GEMM", default="gemm")
    require_flag(section, "zero_point", is_set=True)
    return all_but(Awq(group_size=_group_size(section)), excluded_by(section, "modules_to_not_convert"))


def read_gptq(section: ConfigSection) -> SchemeRules:
    """All layers, changed or excluded by the regular expressions of `dynamic`.

    Some files hold biases, all zero, of layers that have none.
    """
    base = _gptq_scheme(section, section)
    dynamic = section.section("dynamic")
    rules: list[tuple[str, Gptq | None]] = []
    for pattern in dynamic.values if dynamic is not None else ():
        assert dynamic is not None
        if pattern.startswith(_EXCLUDES):
            rules.append((pattern.removeprefix(_EXCLUDES), None))
            continue
        change = dynamic.section(pattern)
        scheme = base if change is None else _gptq_scheme(change, section)
        rules.append((pattern.removeprefix(_CHANGES), scheme))

    def choose(name: str) -> Gptq | None:
        return next((scheme for pattern, scheme in rules if re.match(pattern, name)), base)

    return SchemeRules(choose, ignored=(r".*_proj\.bias",))


def _gptq_scheme(section: ConfigSection, default: ConfigSection) -> Gptq:
    """The scheme of a section, which takes from `default` what it does not say."""

    def source(key: str) -> ConfigSection:
        return section if key in section else default

    source("bits").require("bits", 4, 8)
    source("checkpoint_format").require("checkpoint_format", "gptq", "gptq_v2", default="gptq")
    group_size = _group_size(source("group_size"))
    return Gptq(
        num_bits=source("bits").integer("bits"),
        group_size=group_size,
        is_reordered=source("desc_act").flag("desc_act") and group_size is not None,
        has_zero_offset=source("checkpoint_format").text("checkpoint_format", "gptq") == "gptq",
    )


def _group_size(section: ConfigSection) -> int | None:
    """None when all inputs share a scale, which configs spell -1."""
    value = section.integer("group_size", 128, least=-1)
    if value == 0:
        raise section.error("group_size", "must be positive, or -1 for all inputs")
    return None if value == -1 else value
