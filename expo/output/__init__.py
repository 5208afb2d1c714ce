"""Outputs: the checkpoint writer, manifest and model card, findings, plots, publishing."""
