"""A LaTeX table has a column per heading, and nothing that stands in a cell is a command."""

from llava_cmoe.report.latex import latex


def test_a_table_has_a_column_per_heading_and_a_line_per_row():
    lines = latex(["run", "last", "BWT"], [["cmoe", "57.7 (55.9–59.3)", "-1.4"]], num_text_columns=1).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}" and lines[-1] == r"\end{tabular}"
    assert r"run & last & BWT \\" in lines and r"cmoe & 57.7 (55.9--59.3) & -1.4 \\" in lines


def test_names_are_no_commands():
    [line] = [line for line in latex(["a"], [[r"x_1 & 5% \input{y} $z$ #~^"]], 1).splitlines() if line.startswith("x")]
    assert line == (r"x\_1 \& 5\% \textbackslash{}input\{y\} \$z\$ \#\textasciitilde{}\textasciicircum{} \\")
