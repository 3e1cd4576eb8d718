"""Which type each tensor gets in a file of a given size (`convert --size`).

May import: convert.file_plan, convert.moments and below.
"""
