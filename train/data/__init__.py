"""Manifests, tasks, sampling and batches."""
