"""Monitoring of the service: shadow evaluation, the health probe, and metrics that describe the deployments."""
