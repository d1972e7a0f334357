"""Synthetic tasks: what a mixer can and cannot do, from data made of a seed."""
