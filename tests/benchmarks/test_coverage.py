"""Coverage of the intervals, in short: some cases of `coverage.py`, with the tolerance of their number of data sets."""

import pytest
from scipy import stats

from tests.benchmarks.coverage import cases, coverage

NUMBER = 300
# Numbers of covered data sets that a true coverage from 93 to 97 % leaves once in 1,000 times at either end
FEWEST, MOST = stats.binom.ppf(0.001, NUMBER, 0.93), stats.binom.ppf(0.999, NUMBER, 0.97)


@pytest.mark.parametrize(
    "name",
    [
        "implicit accuracy 62%, 40 prompts x 5 pairs, rho 0.3",
        "implicit accuracy 62%, 20 prompts x 10 pairs, rho 0.3",
        "CHAIR_i 2%, 100 images, rho 0.1",
        "CHAIR_i 20%, 10 images, rho 0.1",
        "F1 95%, 25 images, rho 0.1",
        "change of CHAIR_i 20% to 10%, 30 images",
        "mean rate of 3 seeds, spread 2%, 64 prompts x 1",
        "mean change of 3 seeds, spread 5%, 64 prompts x 1",
    ],
)
def test_intervals_cover(name: str) -> None:
    assert FEWEST <= NUMBER * coverage(cases()[name], NUMBER).covered <= MOST
