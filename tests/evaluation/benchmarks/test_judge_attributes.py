"""Audit of predicted attributes, against numbers worked out by hand."""

from mmalign.data.pairs import ImagePair
from mmalign.evaluation.benchmarks.judge_attributes import audit, column
from mmalign.evaluation.judged_rows import JudgedRow


def test_an_error_has_no_p_value() -> None:
    """Errors of 1, 0, 1, 1, 1, 2 have the root mean square 1.15; that it is not 0 is no finding."""
    ratings = [((1.0,), (2.0,)), ((3.0,), (5.0,)), ((0.0,), (4.0,))]
    pairs = [ImagePair(n, "p", (), str, str(n), attributes=own) for n, own in enumerate(ratings)]
    rows = [JudgedRow(n, {column("x"): [a + 1, b + n]}, {}) for n, ((a,), (b,)) in enumerate(ratings)]
    part, _ = audit(pairs, rows, ["x"])
    (numbers,) = part.values()
    assert isinstance(numbers, dict)
    assert round(numbers["error"]["estimate"], 2) == 1.15 and "p" not in numbers["error"]
    assert "p" in numbers["correlation"]
