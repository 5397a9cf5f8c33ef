"""Numbers as every page shows them, and what a page of scripts says without them."""

from importlib import resources

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


def test_a_page_that_needs_scripts_says_so_without_them():
    folder = resources.files("senticlip").joinpath("templates")
    pages = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    scripted = {name for name, page in pages.items() if "<script>" in page}
    assert scripted == {name for name, page in pages.items() if "<noscript>" in page} == {"serve.html", "timeline.html"}
