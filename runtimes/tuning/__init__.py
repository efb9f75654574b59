"""Tuning: knobs of the kernels (`kernels/knobs.py`) measured on real shapes, with a database. Importing it is light."""
