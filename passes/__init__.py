"""Passes: pure functions of a program (`compiler.passes.Pass`), one algebra in each file."""
