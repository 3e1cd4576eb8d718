"""What people see of a measurement: one description of tables and pictures, as text, PNG or a page.

May import: the ground modules, and yarn_edge.runtime for the environment; matplotlib is imported when something is drawn.
"""
