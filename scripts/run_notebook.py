"""Run a notebook from top to bottom and keep what it shows: ``python scripts/run_notebook.py examples/sampling.ipynb``.

Needs the extra ``examples``. Left out of the file: progress bars and warnings (standard error), times, and the JPEG
that Pillow shows with each PNG.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TIMEOUT = 600.0


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook at `path` with new outputs, run in `folder`; an error in a cell is `CellExecutionError`."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data.pop("image/jpeg", None)
    return notebook


def main() -> None:
    """Run the notebook named on the command line and write it back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args().notebook
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(path, Path(folder))
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
