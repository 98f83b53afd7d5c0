"""Runners of other engines, in an interpreter that has them; none is a dependency of the project."""
