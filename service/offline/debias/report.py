"""What was found, as it is written: JSON, and the evidence of the edit."""

from __future__ import annotations

from pydantic import BaseModel, Field, JsonValue

from vitrine.models.bootstrap import Estimate
from vitrine.models.groups import Accuracy, Change
from vitrine.models.interventions.edit import Condition
from vitrine.models.interventions.spec import Intervention, Mode
from vitrine.service.offline.debias.search import Trial


class Ranked(BaseModel):
    """A feature that distinguishes the groups. Logits are those of one label minus those of another."""

    layer: int
    index: int
    pair: tuple[str, str] = Field(description="the two labels")
    group: str
    logits: Estimate = Field(
        description="how much more the feature contributes in this group than in others, within a label"
    )
    label_logits: float = Field(
        description="how much more it contributes with the first label than with the second, within a group"
    )
    size: float = Field(description="`logits` divided by the standard deviation within label and group")
    label: str | None = Field(description="of its card")
    exemplars: list[str] = Field(description="names of the images on its card")


class Writer(BaseModel):
    """A feature that writes along a direction."""

    layer: int
    index: int
    along: float = Field(
        description="how much more it writes in this group than in others, within a label; in the stream's units"
    )
    label: str | None = Field(description="of its card")


class RankedDirection(BaseModel):
    """A direction of the stream at [CLS] after the last layer, in which a group differs from the others."""

    group: str
    pair: tuple[str, str] = Field(description="the two labels")
    logits: Estimate = Field(
        description="how much it adds to the first label's logit minus the second's in this group, within a label"
    )
    along: float = Field(description="how much longer the stream is along it in this group; in the stream's units")
    by_features: float = Field(description="the part of `along` that features wrote, at any token")
    written_by: list[Writer] = Field(
        description="features that write along it, by their source accounts, largest first"
    )


class TrialRow(BaseModel):
    """A candidate on the finding half."""

    op: str
    features: int = Field(description="number of features or directions")
    mode: Mode
    tokens: str
    shift: float = Field(description="for directions: distance beyond the middle, as a share of the groups' difference")
    moves_logit: float | None = Field(
        description="the edit is only applied if it changes the lead by at least this much"
    )
    worst: float
    average: float

    @classmethod
    def of(cls, trial: Trial) -> TrialRow:
        candidate, tokens = trial.candidate, trial.candidate.tokens
        where = "its own" if tokens is None and candidate.of_features else str(tokens or "cls")
        figures = {"worst": trial.worst, "average": trial.average}
        return cls(
            op=candidate.op,
            features=candidate.count,
            mode=candidate.mode,
            tokens=where,
            shift=candidate.shift,
            moves_logit=candidate.moves_logit,
            **figures,
        )


class Method(BaseModel):
    """One method against the cue, measured on the held-out half."""

    name: str
    what: str = Field(description="description in one sentence, with its prompts or features")
    accuracy: Accuracy
    change: Change | None = Field(description="change from zero-shot; None for zero-shot itself")


class Report(BaseModel):
    """Accuracies are shares of images; intervals hold 95 % of the resamples of images."""

    bundle: str = Field(description="digest")
    labels: list[str]
    templates: list[str]
    cue: list[str] = Field(description="prompts of the cue, if it was given in words")
    others: list[str] = Field(description="prompts of what is there instead of the cue")
    groups_by: str = Field(description="how the groups were found: table, cue or errors")
    groups: list[str]
    finding_images: int
    held_out_images: int
    unreadable: list[str]
    ranking: list[Ranked]
    directions: list[RankedDirection]
    interventions: list[Intervention] = Field(description="the proposed edit; empty if nothing was better than no edit")
    condition: Condition | None = Field(description="condition of the proposed edit")
    mode: Mode | None
    proposed: str | None = Field(description="op, number of features, and mode of the proposed edit")
    tried: list[int] = Field(description="number of edits tried in each round; each round uses more images")
    trials: list[TrialRow] = Field(description="results of the last round, on all images of the finding half")
    refused: dict[str, str] = Field(description="edits that this bundle does not support, and why")
    methods: list[Method] = Field(description="zero-shot first, the edit second, if there is one")
    left_out: list[str] = Field(description="baselines that could not be run, and why")
    seconds: float

    @property
    def description(self) -> str:
        """Of the edit, in a sentence."""
        cue = " or ".join(self.cue) if self.cue else ", ".join(self.groups)
        return f"removes what distinguishes groups other than {', '.join(self.labels)} ({cue}): {self.proposed}"[:2000]

    def evidence(self, data: str) -> dict[str, JsonValue]:
        """What there is to say for the edit. data: of what images."""
        fields: dict[str, JsonValue] = self.model_dump(
            mode="json", exclude={"interventions", "trials", "mode", "condition"}
        )
        return {"data": data} | fields
