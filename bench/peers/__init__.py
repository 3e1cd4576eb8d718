"""Races against other programs, on one harness (`race`). Ratios are from one run, in which the sides take turns.

May import: the other rooms of bench; nothing imports this one.
"""
