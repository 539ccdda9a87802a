"""walkthrough.ipynb runs, and can be read without being run."""

from conftest import ROOT
from nbclient import NotebookClient
import nbformat

BOOK = ROOT / "walkthrough.ipynb"


def test_the_walkthrough_is_short_and_keeps_what_its_cells_gave():
    book = nbformat.read(BOOK, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(book.cells) <= 25 and all(cell.outputs for cell in code)
    assert "error" not in {output.output_type for cell in code for output in cell.outputs}


def test_the_walkthrough_runs_on_another_run_by_changing_one_line(run):
    folder, _ = run
    book = nbformat.read(BOOK, as_version=4)
    line = 'RUN = Path("out")'
    assert line in book.cells[1].source
    book.cells[1].source = book.cells[1].source.replace(line, f"RUN = Path({str(folder / 'out')!r})")
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = [output.get("text", "") for cell in book.cells for output in cell.get("outputs", ())]
    assert "detection F1 by hand" in "".join(printed) and str(folder) not in BOOK.read_text()
