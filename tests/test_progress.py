"""What somebody sees who watches, and who reads a log."""

import pytest

from senticlip.progress import spinner


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (False, False)], indirect=["terminal"])
def test_a_spinner_is_for_who_watches(terminal, shown):
    with spinner("exporting a[b].onnx"):
        pass
    assert ("exporting a[b].onnx" in terminal.getvalue()) == shown
    assert shown or not terminal.getvalue()
