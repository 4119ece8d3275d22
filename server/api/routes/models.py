"""GET /models and GET /models/{name}."""

from fastapi import APIRouter

from server.api.schemas import ModelCard, ModelSummary, Problem, card, summary
from server.segment.service import SegmentationService


def router(service: SegmentationService) -> APIRouter:
    """Makes the routes.

    Args:
        service: has the deployments.
    """
    routes = APIRouter()
    registry = service.registry

    @routes.head("/models", include_in_schema=False)
    @routes.get("/models", summary="Models that are served")
    async def models() -> list[ModelSummary]:
        return [summary(deployment, registry.default) for deployment in registry.deployments.values()]

    @routes.head("/models/{name}", include_in_schema=False)
    @routes.get(
        "/models/{name}", summary="The model card with the level table", responses={404: {"model": Problem}}
    )
    async def model(name: str) -> ModelCard:
        return card(registry.get(name), registry.default)

    return routes
