"""GET /models and GET /models/{name}."""

from fastapi import APIRouter

from server.api.schemas import ModelCard, ModelSummary, Problem, card, summary
from server.errors import UnknownModel
from server.segment.pipeline import Segmenter


def router(segmenter: Segmenter) -> APIRouter:
    """The routes, with what they need."""
    routes = APIRouter()

    @routes.get("/models", summary="Open bundles")
    async def models() -> list[ModelSummary]:
        return [summary(opened, segmenter.default) for opened in segmenter.bundles.values()]

    @routes.get("/models/{name}", summary="The model card with the level table", responses={404: {"model": Problem}})
    async def model(name: str) -> ModelCard:
        opened = segmenter.bundles.get(name)
        if opened is None:
            raise UnknownModel(f"model {name!r} is not open here; there are: {', '.join(segmenter.bundles)}")
        return card(opened, segmenter.default)

    return routes
