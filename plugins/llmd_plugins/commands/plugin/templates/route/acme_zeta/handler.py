"""Called on the loop thread: what takes longer than a millisecond belongs elsewhere."""

from aiohttp import web

from llmd.api.v1 import check_field_names, json_response, object_at, read_json_object, string_at


async def reverse(request: web.Request) -> web.StreamResponse:
    """Every error is raised: InvalidRequest becomes a 400 that names the field."""
    body = object_at("body", await read_json_object(request))
    check_field_names("body", body, ("text",))
    return json_response({"text": string_at("text", body.get("text"))[::-1]})
