"""Every call of AITER's functions fits their signatures, as published and as developed; the package is not imported."""

from __future__ import annotations

import inspect

import pytest

from atom_cluster.ops.aiter import FAMILIES, AiterFunction, why_not
from tests.ops.aiter.stand_in import HEAD, SIGNATURES, WHEEL, install

MISSING_IN_WHEEL = {
    # Of the family, the parameter that version 0.1.7 does not have, or needs.
    "attention": "kv_last_page_lens",
    "mla": "work_info",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_fit_the_functions_as_developed(family: str) -> None:
    for function in (*FAMILIES[family].functions, *FAMILIES[family].float4_functions):
        assert function.mismatch(SIGNATURES[HEAD][f"{function.module}:{function.name}"]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_fit_the_published_wheel_or_are_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, WHEEL)
    reason = why_not(FAMILIES[family].functions)
    if family in MISSING_IN_WHEEL:
        assert reason is not None and MISSING_IN_WHEEL[family] in reason, reason
    else:
        assert reason is None


def test_four_bit_products_need_another_signature_than_that_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, WHEEL)
    reason = why_not(FAMILIES["quantized_linear"].float4_functions)
    assert reason is not None and "gemm_a4w4" in reason
    assert why_not(FAMILIES["quantized_experts"].float4_functions) is None


def test_without_the_package_there_is_a_reason() -> None:
    reason = why_not(FAMILIES["norm"].functions)
    assert reason is not None and "ModuleNotFoundError" in reason


@pytest.mark.parametrize(
    "error", [RuntimeError("ROCm version file not found"), OSError("libamdhip64"), AssertionError()]
)
def test_whatever_the_import_raises_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> None:
        raise error

    monkeypatch.setattr("atom_cluster.ops.aiter.binding.importlib.import_module", fail)
    reason = why_not(FAMILIES["norm"].functions)
    assert reason is not None and type(error).__name__ in reason and str(error) in reason


def test_what_a_version_finds_out_itself_is_not_passed_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(*, x: int) -> int:
        return x

    def new(*, x: int, size: int) -> int:
        return x + size

    def unknown(**kwargs: int) -> int:
        return sum(kwargs.values())

    function = AiterFunction("aiter.some", "function", "x", optional=["size"])
    for implementation, result in ((old, 1), (new, 3), (unknown, 3)):
        monkeypatch.setattr(function, "_find", lambda implementation=implementation: implementation)
        assert function.why_not() is None
        assert function(x=1, size=2) == result


def test_a_parameter_that_must_be_passed_and_is_not_is_a_reason() -> None:
    function = AiterFunction("aiter.some", "function", "x")
    assert function.mismatch(inspect.signature(lambda x, y: None)) is not None
    assert function.mismatch(inspect.signature(lambda y: None)) is not None
    assert function.mismatch(inspect.signature(lambda x, y=None: None)) is None
