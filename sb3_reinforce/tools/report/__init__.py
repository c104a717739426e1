"""
HTML report of training runs: ``sb3-reinforce report RUN [RUN ...]``.

A run is a folder written by ``examples/lunar_lander.py`` or ``sb3-reinforce train``. The report lists missing parts. It is a
single file without JavaScript and external resources, and the same runs always give the same file.
"""

try:
    from sb3_reinforce.tools.report.page import main, render, write_report
    from sb3_reinforce.tools.report.runs import Run, read_run
except ImportError as error:
    raise ImportError(f"{error}. Reports need: pip install 'sb3-reinforce[report]'") from error

__all__ = ["Run", "main", "read_run", "render", "write_report"]
