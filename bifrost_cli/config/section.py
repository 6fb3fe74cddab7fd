"""What a section of a recipe is made of: the types of its keys, and which belong to the identity of a result."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

RUN_ONLY: dict[str, Any] = {"identity": False}  # a key that changes no byte of a result
Count = Annotated[int, Field(ge=1)]
Every = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no change after loading, no silent conversion, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def since(default: Any) -> dict[str, Any]:
    """For a key that was added later: at `default` results are as before it, so identities leave it out."""
    return {"absent": default}


def recorded_as(name: str) -> dict[str, Any]:
    """For a renamed key: identities keep its first name, so that the rename changes no artifact id."""
    return {"identity": name}


def identity_of(section: Section) -> dict[str, Any]:
    """What decides a result in a section, as JSON values under the names that identities record."""
    values, identity = section.model_dump(mode="json"), {}
    for name, info in type(section).model_fields.items():
        facts = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        value = getattr(section, name)
        if isinstance(value, Section):
            identity[name] = identity_of(value)
        elif facts.get("identity") is not False and not ("absent" in facts and values[name] == facts["absent"]):
            identity[str(facts.get("identity", name))] = values[name]
    return identity
