"""Number format of the HTML pages, and their notice for browsers without scripts."""

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


def test_pages_with_scripts_have_a_noscript_notice():
    folder = resources.files("senticlip").joinpath("templates")
    pages = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    with_script = {name for name, page in pages.items() if "<script>" in page}
    assert (
        with_script == {name for name, page in pages.items() if "<noscript>" in page} == {"serve.html", "timeline.html"}
    )
