"""What artifacts a Vision Transformer has, where they are, what they hold, and what registers are worth.

`folder.analyze` measures and writes everything, `folder.compare` does so for several models; they stand on `survey`,
which makes an `ArtifactReport` in one pass. Below lie `norms` and `histograms` (what an outlier is), `verdict`,
`places`, `probes`, `attention`, `sinks` and `ablation`; `figures` and `page` draw. Only what needs no further package
is imported here.
"""

from .norms import TokenNorms, outlier_share, outlier_threshold, summarise_norms, token_norms


__all__ = ["TokenNorms", "outlier_share", "outlier_threshold", "summarise_norms", "token_norms"]
