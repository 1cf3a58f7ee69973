"""How an example becomes text: a query part, an answer part, and what stands between examples.

``{output}`` comes last, and spaces just before it belong to the answer: with "Answer: {output}" the
answer part is " positive", which is how byte-level tokenizers spell a word inside a sentence. Parts
are tokenised apart, so an answer has the same tokens after any query and any demonstrations.

BiAlign (arXiv 2312.17055) and In-context Learning Distillation (arXiv 2212.10670) do not give their
templates; ``metaicl`` is the one MetaICL uses, and the default.
"""

from typing import Literal

from pydantic import Field, model_validator

from stages.sources.reading.boundary import at_spaces
from stages.stage import StageConfig

_INPUT, _OUTPUT = "{input}", "{output}"


class EpisodeTemplate(StageConfig):
    """A demonstration's text, and the separator that follows each demonstration."""

    demonstration: str
    separator: str = Field(min_length=1)

    @model_validator(mode="after")
    def _output_is_last(self) -> "EpisodeTemplate":
        text = self.demonstration
        if text.count(_INPUT) != 1 or text.count(_OUTPUT) != 1 or not text.endswith(_OUTPUT):
            raise ValueError(
                f"demonstration is {text!r}, expected {_INPUT} once and {_OUTPUT} once, at the end"
            )
        return self

    def query_part(self, text: str) -> str:
        """Return all up to the answer."""
        before, after = at_spaces(self._head)[0].split(_INPUT)
        return f"{before}{text}{after}"

    def answer_part(self, output: str) -> str:
        """Return the answer with the spaces that stand before it."""
        return at_spaces(self._head)[1] + output

    @property
    def _head(self) -> str:
        return self.demonstration.removesuffix(_OUTPUT)


TemplateName = Literal["metaicl", "qa", "plain", "lama"]
TEMPLATES: dict[TemplateName, EpisodeTemplate] = {
    "metaicl": EpisodeTemplate(demonstration="{input}\n{output}", separator="\n\n\n"),
    "qa": EpisodeTemplate(demonstration="Question: {input}\nAnswer: {output}", separator="\n\n"),
    "plain": EpisodeTemplate(demonstration="{input}\n{output}", separator="\n\n"),
    "lama": EpisodeTemplate(demonstration="{input} {output}", separator="\n"),
}


def template_of(template: TemplateName | EpisodeTemplate) -> EpisodeTemplate:
    """Return a template by its name, or the recipe's own."""
    return template if isinstance(template, EpisodeTemplate) else TEMPLATES[template]
