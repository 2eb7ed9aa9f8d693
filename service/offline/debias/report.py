"""What was found, as it is written: JSON, and the evidence of the edit."""

from __future__ import annotations

from pydantic import BaseModel, Field, JsonValue

from vitrine.models.bootstrap import Estimate
from vitrine.models.groups import Accuracy, Change
from vitrine.models.interventions.edit import Condition
from vitrine.models.interventions.spec import Intervention, Mode
from vitrine.service.offline.debias.search import Trial


class Ranked(BaseModel):
    """A feature that tells the groups apart. Logits are those of one label less another's."""

    layer: int
    index: int
    pair: tuple[str, str] = Field(description="the labels")
    group: str
    logits: Estimate = Field(description="how many more the feature gives in this group than in others, within a label")
    label_logits: float = Field(description="how many more with the first label than with the second, within a group")
    size: float = Field(description="`logits` over the standard deviation within label and group")
    label: str | None = Field(description="of its card")
    exemplars: list[str] = Field(description="names of images on its card")


class Writer(BaseModel):
    """A feature that writes along a direction."""

    layer: int
    index: int
    along: float = Field(description="how much more in this group than in others, within a label; the stream's units")
    label: str | None = Field(description="of its card")


class RankedDirection(BaseModel):
    """A direction of the stream at [CLS] after the last layer, in which a group differs from the others."""

    group: str
    pair: tuple[str, str] = Field(description="labels")
    logits: Estimate = Field(
        description="how many more of the first label less the second it gives in this group, within a label"
    )
    along: float = Field(description="how much more of the stream is along it in this group; the stream's units")
    by_features: float = Field(description="of that, what features wrote, at any token")
    written_by: list[Writer] = Field(description="by their source accounts, the largest first")


class TrialRow(BaseModel):
    """A candidate on the finding half."""

    op: str
    features: int = Field(description="or directions")
    mode: Mode
    tokens: str
    shift: float = Field(description="of directions: beyond the middle, as a share of the groups' difference")
    moves_logit: float | None = Field(description="applied only where it moves the lead by as much")
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
    """Something done about the cue, on the held-out half."""

    name: str
    what: str = Field(description="in a sentence, with its prompts or features")
    accuracy: Accuracy
    change: Change | None = Field(description="from zero-shot; None: it is that")


class Report(BaseModel):
    """Accuracies are shares of images; intervals hold 95 % of the resamples of images."""

    bundle: str = Field(description="digest")
    labels: list[str]
    templates: list[str]
    cue: list[str] = Field(description="prompts of the cue, if it was given in words")
    others: list[str] = Field(description="prompts of what is there instead")
    groups_by: str = Field(description="table, cue or errors")
    groups: list[str]
    finding_images: int
    held_out_images: int
    unreadable: list[str]
    ranking: list[Ranked]
    directions: list[RankedDirection]
    interventions: list[Intervention] = Field(description="proposed; empty: nothing was better than no edit")
    condition: Condition | None = Field(description="of the proposed edit")
    mode: Mode | None
    proposed: str | None = Field(description="the op, how many features, and the mode")
    tried: list[int] = Field(description="how many edits were tried in each round, on more images each time")
    trials: list[TrialRow] = Field(description="of the last round, on all images of the finding half")
    refused: dict[str, str] = Field(description="what this bundle cannot do, and why")
    methods: list[Method] = Field(description="zero-shot first, the edit second, if there is one")
    left_out: list[str] = Field(description="baselines that could not be run, and why")
    seconds: float

    @property
    def description(self) -> str:
        """Of the edit, in a sentence."""
        cue = " or ".join(self.cue) if self.cue else ", ".join(self.groups)
        return f"takes out what tells groups apart beside {', '.join(self.labels)} ({cue}): {self.proposed}"[:2000]

    def evidence(self, data: str) -> dict[str, JsonValue]:
        """What there is to say for the edit. data: of what images."""
        fields: dict[str, JsonValue] = self.model_dump(
            mode="json", exclude={"interventions", "trials", "mode", "condition"}
        )
        return {"data": data} | fields
