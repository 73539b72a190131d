"""Everything that a run of `ttt3r reconstruct` imports, imported: for processes that fork.

Nothing here starts a thread, so that a fork is as good as a new process.
"""

import anyio._backends._asyncio
import graphviz
import matplotlib.backends.backend_agg
import matplotlib.figure
import mpl_toolkits.mplot3d
import mpmath
import networkx
import numpy as np
import open3d
import PIL.ImageDraw
import PIL.JpegImagePlugin
import PIL.PngImagePlugin
import plotly.io
import plotly.offline
import plotly.subplots
import prefect.flow_engine
import prefect.server.api.server
import prefect.task_engine
import s3fs
import scipy.ndimage
import scipy.optimize
import torch._dynamo
import trimesh.exchange.load

import flows.cli
import flows.progress
import flows.reconstruct_collection
from tasks import report_figures

__all__ = [
    "PIL",
    "anyio",
    "flows",
    "graphviz",
    "matplotlib",
    "mpl_toolkits",
    "mpmath",
    "networkx",
    "open3d",
    "plotly",
    "prefect",
    "s3fs",
    "scipy",
    "torch",
    "trimesh",
]

# Plotly and Matplotlib load the most when they draw.
_path = {"cam_to_world": np.tile(np.eye(4), (2, 1, 1)), "part": np.zeros(2), "segment": np.zeros(2)}
report_figures.top_view(_path, 0).to_html()
report_figures.trajectory_png(_path, 0)
