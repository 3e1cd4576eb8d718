"""What the tables in docs/ are made of, and the models that they are made with.

May import: the other rooms of bench; the demo uses its model.
"""
