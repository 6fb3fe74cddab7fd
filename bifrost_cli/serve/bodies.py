"""What a request may say: OpenAI's fields for images, the pipeline's own beside them, and nothing else."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from bifrost_cli.serve.answers import Limits, Refusal

LARGEST_SEED = 2**53 - 1  # that JavaScript keeps exactly
_SIZE = r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$"
# The pipeline's own settings, as its call and its `edit` take them.
SETTINGS = ("num_inference_steps", "guidance_scale", "decode_steps", "branch_guidance", "temperature", "control_scale")
Auto = Literal["auto"] | None


class PromptBody(BaseModel):
    """What every request says."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    model: str | None = None


class ImageBody(PromptBody):
    """`POST /v1/images/generations`. Fields of OpenAI's that have one possible value here take that one only."""

    n: int = Field(1, ge=1)
    size: Annotated[str, StringConstraints(pattern=_SIZE)] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    quality: Auto = None
    background: Auto = None
    moderation: Auto = None
    stream: bool = False
    partial_images: Literal[0] = 0
    user: str | None = Field(None, max_length=256)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    plan: bool | str | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    decode_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    branch_guidance: float | None = Field(None, allow_inf_nan=False)
    temperature: float | None = Field(None, allow_inf_nan=False)
    control_scale: float | None = Field(None, allow_inf_nan=False)

    @field_validator("n", "size", "response_format", "output_format", "stream", "partial_images", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("partial_images", mode="before")
    @classmethod
    def _zero_of_a_form(cls, value: Any) -> Any:
        return 0 if value == "0" else value

    @property
    def settings(self) -> dict[str, Any]:
        """The pipeline's own settings that were given."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}

    @property
    def side(self) -> int | None:
        """Pixels a side; None leaves it to the pipeline. Refusal: not a square."""
        if self.size == "auto":
            return None
        width, height = map(int, self.size.split("x"))
        if width != height:
            raise Refusal(400, f"size {self.size} is not a square", fix="size=auto", param="size")
        return width

    def seeds(self) -> list[int]:
        """A seed for each image, counting up; drawn where none was given."""
        first = secrets.randbelow(2**31) if self.seed is None else self.seed
        return [first + index for index in range(self.n)]


class EditBody(ImageBody):
    """The fields of `POST /v1/images/edits`, whose `image` and `mask` are files."""

    region: str | None = Field(None, min_length=1)
    strength: float = Field(1.0, gt=0, le=1)
    keep_pixels: bool = False
    input_fidelity: Auto = None

    @field_validator("plan", mode="before")
    @classmethod
    def _word_of_a_form(cls, value: Any) -> Any:
        return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


Body = TypeVar("Body", bound=PromptBody)


def no_model(name: str, ours: str) -> Refusal:
    """The refusal (404) of a model's name that is not ours."""
    what = f"there is no model {name[:100]!r} here"
    return Refusal(404, what, code="BF-SERVE-005", fix=f"model={ours}", param="model")


def read_body(kind: type[Body], fields: Any, limits: Limits, model: str) -> Body:
    """A request's fields, checked. Refusal (400, for another model 404) that names the first field that is wrong."""
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = str(problem["loc"][0])[:64] if problem["loc"] else None
        known = ", ".join(kind.model_fields)
        if problem["type"] == "extra_forbidden":
            raise Refusal(400, f"there is no field {name!r}", fix=f"fields are {known}", param=name) from None
        told = f"{name}: {problem['msg']}" if name else "the body is not an object"
        raise Refusal(400, told, fix="see the field's values" if name else '{"prompt": "a star"}', param=name) from None
    if body.model not in (None, model):
        raise no_model(body.model, model)
    bounds = {"n": limits.images, "num_inference_steps": limits.steps, "decode_steps": limits.steps}
    values = {name: getattr(body, name, None) or 0 for name in bounds} | {"size": getattr(body, "side", None) or 0}
    for name, most in {**bounds, "size": limits.side}.items():
        if values[name] > most:
            raise Refusal(400, f"{name} is at most {most} here", fix=f"{name}={most}", param=name)
    for name in ("prompt", "plan", "region"):
        text = getattr(body, name, None)
        if isinstance(text, str) and len(text) > limits.prompt_chars:
            raise Refusal(400, f"{name} has more than {limits.prompt_chars} characters", fix="shorten it", param=name)
    return body
