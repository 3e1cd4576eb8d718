"""Hostile inputs by kind, run under limits (`make fuzz`; docs/fuzzing.md).

`kinds` lists them. An input is made from its kind, the seed and its number, so that it can be made again.
"""

import os

os.environ.setdefault(
    "OMP_THREAD_LIMIT", "1"
)  # read when its library is loaded; its threads do not survive the forks of `loads`
