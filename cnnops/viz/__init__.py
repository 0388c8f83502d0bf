"""Pictures of a run. Each is drawn off screen and written as PNG."""

from cnnops.viz.run import save_curves, save_filters, save_samples

__all__ = ["save_curves", "save_filters", "save_samples"]
