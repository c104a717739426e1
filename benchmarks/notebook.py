"""
Run the notebook in a temporary folder, and write its outputs to it.

    python -m benchmarks.notebook
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "examples" / "lunar_lander.ipynb"


def execute() -> Any:
    """Return the executed notebook, without times and the version of Python."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=600, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": folder}}
        ).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main() -> None:
    import nbformat

    nbformat.write(execute(), NOTEBOOK)


if __name__ == "__main__":
    main()
