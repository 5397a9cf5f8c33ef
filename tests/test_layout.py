"""A report in blocks as text, as a page, and its tables in LaTeX."""

from senticlip.layout import as_html, as_markdown, latex_table

TABLE = (["", "Acc"], [["a_b", "50.00 ± 1.00"], ["<i> †", "−1 %"]], {(1, 1)})


def test_adjacent_items_form_one_list():
    page = as_html([("li", "a"), ("li", "b"), ("p", "c"), ("li", "d")], None)
    assert "<main><ul><li>a</li><li>b</li></ul><p>c</p><ul><li>d</li></ul></main>" in page


def test_markdown():
    blocks = [("#", "a"), ("p", "b"), ("li", "c"), ("figure", ("d.svg", "e")), ("##", "f")]
    assert as_markdown(blocks).split("\n\n") == ["# a", "b", "- c", "![e](d.svg)", "## f\n"]


def test_html_is_escaped():
    page = as_html([("#", "<b>")], None)
    assert "<h1>&lt;b&gt;</h1>" in page


def test_best_cells_are_bold():
    page = as_html([("table", TABLE)], None)
    assert "<tr><td>a_b</td><td>50.00 ± 1.00</td></tr><tr><td>&lt;i&gt; †</td><td><b>−1 %</b></td></tr>" in page
    page = as_html([("table", ([""], [["1.00 ± 2.00 (3.00, −2.00)", "+1.00 [0.00, +2.00]"]], {(0, 0)}))], None)
    assert "<td><b>1.00 ± 2.00<br><small>(3.00, −2.00)</small></b></td><td>+1.00<br><small>[0.00, +2.00]<" in page
    assert as_markdown([("table", TABLE)]).splitlines()[2:] == ["| a_b | 50.00 ± 1.00 |", "| <i> † | **−1 %** |"]


def test_latex_table():
    lines = latex_table("50 % of it", "tab:1-M", *TABLE).splitlines()
    assert lines == [
        r"\begin{table}",
        r"\centering",
        r"\caption{50 \% of it}",
        r"\label{tab:1-M}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r" & Acc \\",
        r"\midrule",
        r"a\_b & 50.00 $\pm$ 1.00 \\",
        r"<i> $^\dagger$ & \textbf{$-$1 \%} \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
