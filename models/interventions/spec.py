"""An intervention as a user writes it: what is changed, where, and how. No arrays: `models.interventions.changes`.

Four things can be changed, each at some tokens:

    a feature   `layer` and `index` (of the CLT, or of the residual SAEs): its activation z becomes z'
    a row       `row` of the ledger, and its `layer`: what attention, the MLP or the CLT's features of a layer write
    a head      `layer` and `head`: what one attention head writes

    ablate   z' = 0, or with `to: mean` the average picture's activation
    scale    z' = value * z
    set      z' = value
    project  the stream's part along the feature's direction is taken out after its layer and every later one, or along
             the vector after its layer alone; with `to: mean` it is set to the average picture's, with `value` to that
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vitrine.models.bundle.layout import Dictionary

Op = Literal["ablate", "scale", "set", "project"]
Row = Literal["prior", "attention", "mlp", "clt", "bias", "error"]
Mode = Literal["direct", "rerun"]

Token = Annotated[int, Field(ge=0, strict=True)]
Tokens = Literal["all", "cls", "patches"] | Annotated[tuple[Token, ...], Field(min_length=1)]

ROWS_OF_A_LAYER: tuple[Row, ...] = ("attention", "mlp", "clt")
MAX_VALUE = 1e6  # of `value`: float32 computes with it
MAX_WIDTH = 16_384  # numbers of a `vector`

Number = Annotated[float, Field(ge=-MAX_VALUE, le=MAX_VALUE, allow_inf_nan=False)]


class Intervention(BaseModel):
    """One change. Which fields belong together is checked here; whether the bundle has such a feature, later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Op
    layer: int | None = Field(default=None, ge=0, strict=True, description="layer of the feature, row or head")
    index: int | None = Field(default=None, ge=0, strict=True, description="index of a feature")
    dictionary: Dictionary = Field(default="clt", description="dictionary of the feature")
    row: Row | None = Field(default=None, description="a row of the ledger; prior, bias and error have no layer")
    head: int | None = Field(default=None, ge=0, strict=True, description="head of the layer's attention")
    vector: Annotated[tuple[Number, ...], Field(min_length=1, max_length=MAX_WIDTH)] | None = Field(
        default=None, description="a direction of the stream, of any length, for `project`"
    )
    tokens: Tokens | None = Field(
        default=None, description="where: all, cls, patches or numbers (0: [CLS]); default: all for features, else cls"
    )
    to: Literal["zero", "mean"] = Field(
        default="zero", description="what `ablate` and `project` replace it by: zero, or the average picture's value"
    )
    value: Number | None = Field(
        default=None, description="for `scale` (a factor), for `set`, and for `project` (the value along the direction)"
    )
    direction: Literal["decoder", "encoder"] = Field(
        default="decoder", description="for `project`: the direction that the feature writes, or the one that it reads"
    )

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        named = [name for name in ("index", "row", "head", "vector") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"give exactly one of index (a feature), row, head and vector, not {', '.join(named) or 'none'}"
            )
        if self.row is None or self.row in ROWS_OF_A_LAYER:
            if self.layer is None:
                raise ValueError(f"a {self.row or 'feature, head or vector'} requires a layer")
        elif self.layer is not None:
            raise ValueError(f"the row {self.row} has no layer")
        if self.vector is not None:
            if self.op != "project":
                raise ValueError(
                    f"{self.op} cannot be used with a vector; `project` removes it, or sets it to a `value`"
                )
            if not any(self.vector):
                raise ValueError("a vector of zeros has no direction")
        elif self.index is None:
            if self.op in ("set", "project"):
                raise ValueError(f"{self.op} can only be used with features; rows and heads can be ablated or scaled")
            if self.to == "mean":
                raise ValueError("`to: mean` can only be used with features, whose means the bundle has")
        if self.index is None and self.dictionary != "clt":
            raise ValueError("`dictionary` can only be used with features")
        if self.op in ("scale", "set") and self.value is None:
            raise ValueError(f"{self.op} requires a value")
        if self.op == "ablate" and self.value is not None:
            raise ValueError("ablate takes no value")
        if self.to == "mean" and self.op in ("scale", "set"):
            raise ValueError("`to` can only be used with ablate and project")
        if self.to == "mean" and self.value is not None:
            raise ValueError("give `to: mean` or a value, not both")
        if self.direction == "encoder" and (self.op != "project" or self.index is None):
            raise ValueError("`direction` can only be used with features that are projected")
        return self

    @property
    def where(self) -> Tokens:
        """The tokens, with the default filled in."""
        return self.tokens or ("cls" if self.index is None else "all")
