"""Benchmarks: what the machine allows, and how much of that the operations, the model and other engines reach.

They are run from the root of the repository, see README.md, and are no part of the installed package. Nothing is
imported here, because the runners of other engines run in interpreters that lack our dependencies.
"""
