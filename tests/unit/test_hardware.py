"""Half precision is used where it pays off, and the choice depends on the hardware, not on noise."""

from __future__ import annotations

import logging

import pytest
import torch
from pydantic import ValidationError

from modelweld.config import Evaluate
from modelweld.hardware import Half, Precision, PrecisionChoice, choose_precision, flags_name, gflops

SPEEDS: dict[str, dict[Precision, float]] = {
    "emulated": {"bfloat16": 0.7, "float16": 0.9, "float32": 35.0},
    "native": {"bfloat16": 400.0, "float16": 300.0, "float32": 35.0},
    "near": {"bfloat16": 36.0, "float16": 36.0, "float32": 35.0},
}


def choose(requested: str, speeds: str, able: bool | None) -> PrecisionChoice:
    def measure(precision: Precision, device: str) -> float:
        assert device == "cpu"
        return SPEEDS[speeds][precision]

    def supports(half: Half, device: str) -> bool | None:
        return able

    return choose_precision(requested, "cpu", measure=measure, supports=supports)  # type: ignore[arg-type]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("speeds", "able", "used_half"),
    [
        ("native", True, True),
        ("native", None, True),
        ("emulated", True, False),
        ("emulated", None, False),
        ("emulated", False, False),
        # Whatever noise a measurement shows, hardware without the instructions computes in float32.
        ("native", False, False),
        ("near", True, True),
        ("near", None, False),
    ],
)
def test_half_precision_is_used_where_it_is_faster(half: str, speeds: str, able: bool | None, used_half: bool) -> None:
    assert choose(half, speeds, able) == PrecisionChoice(half, half if used_half else "float32")  # type: ignore[arg-type]


def test_the_warning_names_both_speeds_and_how_to_force_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choose("bfloat16", "emulated", False)
    (message,) = caplog.messages
    assert "0.7 GFLOP/s in bfloat16, 35.0 in float32" in message
    assert "cpu has no bfloat16 instructions" in message
    assert "`precision: bfloat16!`" in message


def test_nothing_is_said_or_measured_where_nothing_is_decided(caplog: pytest.LogCaptureFixture) -> None:
    def measure(precision: Precision, device: str) -> float:
        raise AssertionError("measured")

    with caplog.at_level(logging.WARNING):
        assert choose_precision("float32", "cpu", measure=measure).used == "float32"
        assert choose_precision("bfloat16!", "cpu", measure=measure).used == "bfloat16"
        assert choose_precision("float16!", "cpu", measure=measure).used == "float16"
        choose("bfloat16", "native", True)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("description", "bfloat16", "float16"),
    [
        ("flags\t\t: fpu avx avx2 fma\n", False, False),
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 avx512_fp16\n", True, True),
        ("Features\t: fp asimd fphp asimdhp bf16\n", True, True),
        ("flags\t\t: avx2 avx512_bf16\n\nflags\t\t: avx2\n", False, False),
        ("vmx flags\t: vnmi avx512_bf16\nflags\t\t: avx2\n", False, False),
        ("model name\t: something\n", None, None),
        ("", None, None),
    ],
)
def test_instructions_are_those_that_every_core_lists(
    description: str, bfloat16: bool | None, float16: bool | None
) -> None:
    assert flags_name("bfloat16", description) is bfloat16
    assert flags_name("float16", description) is float16


def test_measuring_leaves_the_process_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    measured = gflops.__wrapped__
    assert measured("float32", "cpu") > 0
    assert measured("bfloat16", "cpu") > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_params_default_to_float32_and_take_a_forced_precision() -> None:
    assert Evaluate().precision == "float32"
    assert Evaluate(precision="bfloat16!").precision == "bfloat16!"
    with pytest.raises(ValidationError, match="precision"):
        Evaluate.model_validate({"precision": "float32!"})
