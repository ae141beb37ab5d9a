from __future__ import annotations

import numpy as np
import pytest

from dlrm_deploy.bench.agreement import check, compare
from dlrm_deploy.errors import EngineError

LOGITS = np.random.default_rng(0).normal(0.2, 0.02, 300)  # nearly constant, as random weights give


def probabilities(logits: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def checked(output: np.ndarray, tables: str = "fp32", mlp: str = "bf16") -> None:
    found = compare(output, probabilities(LOGITS))
    check(found, name="peer", reference="torch", tables=tables, mlp=mlp, batch=300, limit=1e-6)


def test_spread_error_is_the_difference_against_the_spread_of_the_logits():
    found = compare(probabilities(LOGITS + 0.002), probabilities(LOGITS))
    assert found.spread_error == pytest.approx(0.1, rel=0.1)
    assert found.correlation == pytest.approx(1.0, abs=1e-4)
    assert found.max_abs_difference == pytest.approx(0.0005, rel=0.05)


def test_a_small_difference_is_no_proof_where_outputs_hardly_vary():
    other_model = probabilities(np.random.default_rng(1).permutation(LOGITS))
    found = compare(other_model, probabilities(LOGITS))
    assert found.max_abs_difference < 0.03
    with pytest.raises(EngineError, match="correlation of the logits .* on a batch of 300"):
        checked(other_model)
    with pytest.raises(EngineError, match="correlation of the logits 0.0000"):
        checked(np.full_like(other_model, 0.55))


def test_rounding_of_bf16_and_int8_is_accepted():
    noise = np.random.default_rng(2).normal(0, 0.001, 300)
    checked(probabilities(LOGITS + noise))
    checked(probabilities(LOGITS + noise), tables="int8")


def test_int4_tables_and_int8_mlps_may_be_farther_off():
    noise = np.random.default_rng(2).normal(0, 0.006, 300)
    checked(probabilities(LOGITS + noise), tables="int4")
    checked(probabilities(LOGITS + noise), mlp="int8")
    with pytest.raises(EngineError, match="at most 0.1, and a correlation of at least 0.9"):
        checked(probabilities(LOGITS + 3 * noise), mlp="int8")
    with pytest.raises(EngineError, match="at most 0.02, and a correlation of at least 0.99"):
        checked(probabilities(LOGITS + noise), tables="int8")


def test_a_shift_of_all_probabilities_is_refused():
    with pytest.raises(EngineError, match=r"peer differs from torch by 0.04.* See what `dlrm-deploy check"):
        checked(probabilities(LOGITS) + np.float32(0.04))


def test_float32_engines_are_held_to_rounding():
    checked(probabilities(LOGITS), mlp="fp32")
    with pytest.raises(EngineError, match="at most 1e-06 is rounding"):
        checked(probabilities(LOGITS) + np.float32(2e-6), mlp="fp32")


@pytest.mark.parametrize("values", [[0.5] * 300, [0.5, 0.6]])
def test_too_few_samples_or_constant_ones_have_no_correlation(values):
    outputs = np.array(values, np.float32)
    found = compare(outputs, outputs)
    assert (found.correlation, found.spread_error, found.max_abs_difference) == (None, None, 0.0)


def test_certain_probabilities_do_not_overflow():
    outputs = np.array([0.0, 1.0] * 40, np.float32)
    assert compare(outputs, outputs).correlation == pytest.approx(1.0)
