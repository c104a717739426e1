"""
One HTML page about runs: ``sb3-reinforce report RUN [RUN ...]``.

A run is a folder that ``examples/lunar_lander.py`` or ``sb3-reinforce train`` has written. The page shows what is in it and
says what is not. It is one file that needs no network and no JavaScript. The same input gives the same page.
"""

try:
    from sb3_reinforce.tools.report.page import main, render, write_report
    from sb3_reinforce.tools.report.runs import Run, read_run
except ImportError as error:
    raise ImportError(f"{error}. Reports need: pip install 'sb3-reinforce[report]'") from error

__all__ = ["Run", "main", "read_run", "render", "write_report"]
