"""Numbers as every page shows them."""

import pytest

from senticlip.pages import signed


@pytest.mark.parametrize(
    ("number", "options", "shown"),
    [
        (0.1251, {}, "+0.125"),
        (-0.03, {}, "−0.030"),
        (-0.0004, {}, "0.000"),
        (0.0, {"digits": 2}, "0.00"),
        (-12.345, {"digits": 1}, "−12.3"),
        (0.138, {"plus": ""}, "0.138"),
        (-0.047, {"plus": ""}, "−0.047"),
    ],
)
def test_signed(number, options, shown):
    assert signed(number, **options) == shown
