"""What artifacts a Vision Transformer has: norms of its tokens, and what counts as an outlier."""

from .norms import TokenNorms, outlier_share, outlier_threshold, summarise_norms, token_norms


__all__ = ["TokenNorms", "outlier_share", "outlier_threshold", "summarise_norms", "token_norms"]
