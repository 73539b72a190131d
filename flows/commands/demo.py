"""`ttt3r demo`: the bundled sample drive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.printing import print_figures, say
from flows.commands.reconstruct import run_reconstruction

app = typer.Typer()


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder that takes the result.")] = "out/demo",
) -> None:
    """Reconstruct the bundled sample drive and compare it with its ground truth."""
    from storage.drives import store_url
    from tasks.config import BudgetConfig, ReconstructionConfig
    from tasks.evaluate import evaluate_store

    sample = Path(__file__).parents[1] / "samples" / "street.mp4"
    run_reconstruction(str(sample), output, ReconstructionConfig(), BudgetConfig())
    truth = sample.with_name("street_groundtruth_tum.txt")
    figures = evaluate_store(store_url(output, "street"), str(truth), "tum")
    say("", "against the sample's ground truth:")
    print_figures(figures)
