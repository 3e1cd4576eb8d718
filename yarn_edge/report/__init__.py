"""What people see of a measurement: one description of tables and pictures, as text, JSON, PNG or a page.

May import: the ground modules; matplotlib is imported when something is drawn.
"""
