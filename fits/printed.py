"""How results show themselves: as text in a terminal, as HTML in a notebook."""

from __future__ import annotations


class Printed:
    """A result whose ``__str__`` says everything, doubts first."""

    def __rich__(self):
        from rich.text import Text

        return Text(str(self))

    def _repr_html_(self) -> str:
        from fits.tables import notebook

        return notebook(self)
