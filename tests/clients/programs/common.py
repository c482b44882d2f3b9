"""What the client programs share: where the daemon is, and how their findings get back."""

from __future__ import annotations

import json
import os
from typing import Any

URL = os.environ["LLMD_TEST_URL"]
KEY = os.environ["LLMD_TEST_KEY"]
ASK = [{"role": "user", "content": "What is 12 + 30?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": CITY}}


def tell(**found: Any) -> None:
    """Print the findings as the last line of the output."""
    print(json.dumps(found), flush=True)
