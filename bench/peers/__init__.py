"""Races against other programs: each prints ratios from one run.

May import: the other rooms of bench; nothing imports this one.
"""
