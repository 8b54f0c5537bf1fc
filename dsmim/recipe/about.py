"""The section of a recipe that says, for its readers, which published run it is."""

from __future__ import annotations

from dsmim.recipe.section import Positive, Section


class About(Section):
    """What a recipe is, for readers. It decides nothing, and is not compared when a run resumes."""

    paper: str | None = None
    """Where the run was published, such as arXiv 2206.04664."""
    model: str | None = None
    """The network as the paper names it, and the side of its images."""
    data: str | None = None
    """The data set as it was published."""
    epochs: Positive | None = None
    """Passes over the data set, as its authors count them."""
    expected: str | dict[str, float] | None = None
    """The published result: a short text, or figures by name, such as {accuracy: 85.04} in per cent; null: none is
    known."""
    source: str | None = None
    """Where the values come from."""
    gmacs: Positive | None = None
    """10⁹ multiply-accumulates of the forward pass of one image in the encoder, for the cost of the run."""

    @property
    def result(self) -> str | None:
        """The expected result in one line."""
        if not isinstance(self.expected, dict):
            return self.expected
        return ", ".join(f"{name} {value:g}" for name, value in self.expected.items())
