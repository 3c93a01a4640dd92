"""Tables for a paper: plain LaTeX that needs no package, whatever the names in it hold."""

from __future__ import annotations

from collections.abc import Sequence

SPECIAL = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
        **{"–": "--", "−": "$-$", "±": r"$\pm$", "·": r"$\cdot$"},
    }
)


def latex(headings: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """A `tabular` whose first columns hold text, the others numbers."""
    columns = "l" * num_text_columns + "r" * (len(headings) - num_text_columns)
    first, *others = (" & ".join(cell.translate(SPECIAL) for cell in row) + r" \\" for row in (headings, *rows))
    lines = (rf"\begin{{tabular}}{{{columns}}}", r"\hline", first, r"\hline", *others, r"\hline", r"\end{tabular}")
    return "\n".join(lines)
