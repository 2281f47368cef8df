"""Run notebooks of this folder and store what they print, without progress bars and warnings.

python docs/tutorials/execute.py             # all of them
python docs/tutorials/execute.py video serve
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def executed(path: Path, timeout: int = 900) -> Any:
    """A notebook with new outputs; `path` stays as it is.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell has failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": FOLDER}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/jpeg" in output.get("data", {}):
                    output.data.pop("image/png", None)  # the same, ten times as large
    return notebook


def printed(notebook: Any) -> list[str]:
    """What the code cells print or show as text; nothing for cells that are marked `varies`."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and "varies" not in cell.metadata.get("tags", ()):
            shown = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
            texts.append("".join(shown).replace("\r\n", "\n"))
    return texts


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in names:
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(executed(path), path)
        print(path)


if __name__ == "__main__":
    main()
