"""Deployments on engines for clusters."""
