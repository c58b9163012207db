"""For whoever subscribes to the public topics: the AsyncAPI document, and the JSON Schema of each message."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import Response

from api.bodies import StrictRoute
from api.envelopes import answered
from api.errors import Problem
from schemas.asyncapi import document
from schemas.cloud_events import SCHEMAS_PATH
from schemas.public_forms import published_schemas

SCHEMA_TYPE = "application/schema+json"
NAME_CHARS_MAX = 100
# A schema may gain fields; what is there stays.
CACHING = {"Cache-Control": "public, max-age=3600"}

router = APIRouter(route_class=StrictRoute, tags=["Events"])


@router.get("/asyncapi.json", response_class=Response)
async def get_asyncapi() -> Response:
    """The public topics as an AsyncAPI 3 document."""
    return answered(document())


@router.get(SCHEMAS_PATH + "/{name}", response_class=Response)
async def get_event_schema(
    name: Annotated[str, Path(max_length=NAME_CHARS_MAX, examples=["turn.completed.v1.json"])],
) -> Response:
    """The JSON Schema of a message on the public topics, as its `ce_dataschema` names it."""
    schema = published_schemas().get(name.removesuffix(".json")) if name.endswith(".json") else None
    if schema is None:
        raise Problem("not_found", "There is no such schema; /asyncapi.json names every message.")
    return Response(schema, media_type=SCHEMA_TYPE, headers=CACHING)
