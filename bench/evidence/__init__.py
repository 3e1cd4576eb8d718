"""What makes the tables and pictures in docs/, and the models that they are made with.

May import: the other rooms of bench; the demo uses its model.
"""
