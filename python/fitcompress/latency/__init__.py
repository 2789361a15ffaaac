"""Milliseconds of networks on a target: measured, fitted, predicted, and checked."""
