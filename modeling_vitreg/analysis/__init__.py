"""Artifacts of a Vision Transformer: outliers, where they lie, what tokens encode, and what registers contribute.

`report_dir.analyze` measures one model and writes the whole report; `report_dir.compare` does so for several models.
Both call `survey`, which makes an `ArtifactReport` in one pass over the images. `norms`, `histograms` and `verdict`
define an outlier; `positions`, `attention`, `activations`, `ablation` and `probes` are the sections of the report;
`figures` and `html` show it. Only modules without optional dependencies are imported here.
"""

from .norms import TokenNorms, outlier_share, outlier_threshold, summarise_norms, token_norms


__all__ = ["TokenNorms", "outlier_share", "outlier_threshold", "summarise_norms", "token_norms"]
