"""Runners of our own engine, each in a process of its own."""
