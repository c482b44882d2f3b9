"""instructor: answers as pydantic objects, by tools and by JSON schema, whole and in parts as they come."""

from typing import Literal

import instructor
import openai
from common import KEY, URL, tell
from pydantic import BaseModel, Field


class Trip(BaseModel):
    """What is asked for: bounds that only a grammar can hold a small model to."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)
    unit: Literal["C", "F"]


def client(mode):
    """An instructor client of one mode."""
    return instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0), mode=mode)


ASK = {
    "model": "demo", "messages": [{"role": "user", "content": "Three days in Paris."}], "temperature": 0,
    "max_tokens": 200, "max_retries": 0,
}  # fmt: skip
modes = {"tools": instructor.Mode.TOOLS, "schema": instructor.Mode.JSON_SCHEMA}
whole = {name: client(mode).chat.completions.create(response_model=Trip, **ASK) for name, mode in modes.items()}
parts = list(client(instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(response_model=Trip, **ASK))
tell(
    **{name: trip.model_dump() for name, trip in whole.items()},
    num_parts=len(parts),
    last=parts[-1].model_dump(),
)
