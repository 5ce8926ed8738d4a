"""quant_method `mxfp4` (gpt-oss): experts in MXFP4, everything else in plain floats."""

from __future__ import annotations

from atom_cluster.quantization.microscaling import Mxfp4
from atom_cluster.quantization.names import is_listed
from atom_cluster.quantization.rules import ConfigSection, SchemeRules, excluded_by

_EXPERTS = ("experts",)


def read_mxfp4(section: ConfigSection) -> SchemeRules:
    """Only experts have the format, whatever `modules_to_not_convert` leaves."""
    scheme = Mxfp4(inputs=None, codes_name="blocks", scale_name="scales", is_grouped=True)
    excluded = excluded_by(section, "modules_to_not_convert")
    return SchemeRules(lambda name: scheme if is_listed(name, _EXPERTS) and not is_listed(name, excluded) else None)
