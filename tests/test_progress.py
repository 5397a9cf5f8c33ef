"""Progress display on a terminal and in a log file."""

import pytest

from senticlip.progress import spinner


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (False, False)], indirect=["terminal"])
def test_spinner_is_shown_on_a_terminal_only(terminal, shown):
    with spinner("exporting a[b].onnx"):
        pass
    assert ("exporting a[b].onnx" in terminal.getvalue()) == shown
    assert shown or not terminal.getvalue()
