"""What the service says, as typed values; the examples are those of its OpenAPI description."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from ringmark.watermark.detect.verdict import Judged
    from ringmark.watermark.detect.verifier import Verifier

__all__ = ["Answer", "Created", "Item", "Job", "Problem", "Refusal", "answer", "for_public"]

EVIDENCE: dict[str, JsonValue] = {
    "key": "3f9a2b10c4d5e6f7",
    "p_value": 2.1e-09,
    "log10_p": -8.68,
    "score": 7.4,
    "stages": {"latents": 0.31, "3 steps": 2.1e-09},
    "residual": 2.3,
    "notes": ["resized 512x512 -> 128x128"],
}
ANSWER: dict[str, JsonValue] = {
    "verdict": "present",
    "sentence": "carries key 3f9a2b10",
    "keys": ["3f9a2b10c4d5e6f7"],
    "notes": ["resized 512x512 -> 128x128"],
    "rests_on": {"model": "pocket", "keys_tested": 1, "alpha": 0.001, "calibration": "5d1e0c7ab2f49386"},
    "evidence": None,
}
ITEM: dict[str, JsonValue] = {"name": "picture.png", "answer": ANSWER, "problem": None}


class Basis(BaseModel):
    """What verdicts rest on: the model, how many keys were tested, the significance level, and the calibration."""

    model: str
    keys_tested: int
    alpha: float
    calibration: str | None = Field(description="Its fingerprint; null if p rests on the model's own null.")


class Evidence(BaseModel):
    """The figures behind a verdict, for callers whose scope is p."""

    model_config = ConfigDict(json_schema_extra={"example": EVIDENCE})

    key: str = Field(description="The fingerprint of the key that fits best.")
    p_value: float = Field(description="Corrected for the number of keys and of tests.")
    log10_p: float
    score: float
    stages: dict[str, float] = Field(description="The p-values of the stages that the picture went through.")
    residual: float | None = Field(description="RMS error of the decoder inversion in grey levels.")
    notes: list[str]


class Answer(BaseModel):
    """The verdict on a picture."""

    model_config = ConfigDict(json_schema_extra={"example": ANSWER})

    verdict: Literal["present", "absent", "inconclusive"]
    sentence: str
    keys: list[str] = Field(description="Fingerprints of the keys that the picture carries.")
    notes: list[str] = Field(description="How the picture was converted.")
    rests_on: Basis
    evidence: Evidence | None = Field(description="Null unless the token's scope is p.")


class Problem(BaseModel):
    """Why a request or a picture was refused: a stable code, and the fact in words."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"code": "image.damaged", "message": "is damaged or cut off"}}
    )

    code: str
    message: str


class Refusal(HTTPException):
    """A refusal with a code: `fact` says why, and `retry_after` in how many seconds the request may be sent again."""

    def __init__(self, status: int, code: str, fact: str, retry_after: float | None = None) -> None:
        headers = {"Retry-After": str(max(1, math.ceil(retry_after)))} if retry_after is not None else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, fact, headers)
        self.code = code


class Created(BaseModel):
    """A new job."""

    model_config = ConfigDict(json_schema_extra={"example": {"id": "b2f49386c7ab5d1e", "pictures": 12}})

    id: str
    pictures: int


class Item(BaseModel):
    """A picture of a job: its answer or the problem with it, both null while it waits."""

    model_config = ConfigDict(json_schema_extra={"example": ITEM})

    name: str
    answer: Answer | None = None
    problem: Problem | None = None


class Job(BaseModel):
    """A job and its pictures, in the order in which they were sent."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "b2f49386c7ab5d1e",
                "state": "done",
                "created": "2026-05-04T12:00:00Z",
                "pictures": [ITEM],
            }
        }
    )

    id: str
    state: Literal["working", "done"]
    created: str
    pictures: list[Item]


def answer(judged: Judged, verifier: Verifier) -> Answer:
    """The whole answer; `for_public` leaves the evidence out."""
    best = judged.best
    keys = [verdict.key for verdict in judged.present]
    return Answer(
        verdict={True: "present", False: "absent", None: "inconclusive"}[best.present],  # type: ignore[arg-type]
        sentence=_sentence(judged),
        keys=keys,
        notes=list(judged.sample.notes),
        rests_on=Basis(
            model=verifier.recoverer.model.name,
            keys_tested=len(judged.verdicts),
            alpha=verifier.alpha,
            calibration=best.calibration,
        ),
        evidence=Evidence(
            key=best.key,
            p_value=best.p_value,
            log10_p=best.log10_p,
            score=best.score,
            stages=best.stages,
            residual=best.residual,
            notes=list(best.notes),
        ),
    )


def _sentence(judged: Judged) -> str:
    """The verdict in words, without p."""
    best, present, tested = judged.best, judged.present, len(judged.verdicts)
    if present:
        names = ", ".join(verdict.key[:8] for verdict in present)
        return f"carries key{'' if len(present) == 1 else 's'} {names}"
    if best.present is None:
        return f"inconclusive for key {best.key[:8]}"
    return f"does not carry key {best.key[:8]}" if tested == 1 else f"carries none of {tested} keys"


def for_public(whole: Answer) -> Answer:
    """The answer for the scope "verdict": an oracle of p-values would help to remove or forge a mark.

    The notes on a verdict can name p and ranks, so only the notes on the conversion of the picture stay.
    """
    return whole.model_copy(update={"evidence": None})
