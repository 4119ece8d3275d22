"""What watches the service: shadow evaluation, the health probe, and what metrics are told of the deployments."""
