"""What to cite: the paper of registers, and that of the family that weights or objective come from."""

from __future__ import annotations


_REGISTERS = ("darcet2024registers", "Vision Transformers Need Registers", "Darcet, Timothée and Oquab, Maxime and "
              "Mairal, Julien and Bojanowski, Piotr", "2024", "2309.16588")  # fmt: skip
_DINO = ("caron2021dino", "Emerging Properties in Self-Supervised Vision Transformers", "Caron, Mathilde and Touvron, "
         "Hugo and Misra, Ishan and Jégou, Hervé and Mairal, Julien and Bojanowski, Piotr and Joulin, Armand",
         "2021", "2104.14294")  # fmt: skip
_DINOV2 = ("oquab2024dinov2", "DINOv2: Learning Robust Visual Features without Supervision",
           "Oquab, Maxime and Darcet, Timothée and Moutakanni, Théo and others", "2024", "2304.07193")  # fmt: skip
_DINOV3 = ("simeoni2025dinov3", "DINOv3", "Siméoni, Oriane and Vo, Huy V. and Seitzer, Maximilian and others",
           "2025", "2508.10104")  # fmt: skip
_DEIT = ("touvron2021deit", "Training data-efficient image transformers and distillation through attention",
         "Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and others", "2021", "2012.12877")  # fmt: skip
_DEIT3 = ("touvron2022deit3", "DeiT III: Revenge of the ViT", "Touvron, Hugo and Cord, Matthieu and Jégou, Hervé",
          "2022", "2204.07118")  # fmt: skip
_MAE = ("he2022mae", "Masked Autoencoders Are Scalable Vision Learners", "He, Kaiming and Chen, Xinlei and Xie, "
        "Saining and Li, Yanghao and Dollár, Piotr and Girshick, Ross", "2022", "2111.06377")  # fmt: skip
_SIMMIM = ("xie2022simmim", "SimMIM: A Simple Framework for Masked Image Modeling", "Xie, Zhenda and Zhang, Zheng and "
           "Cao, Yue and others", "2022", "2111.09886")  # fmt: skip
_CLIP = ("radford2021clip", "Learning Transferable Visual Models From Natural Language Supervision",
         "Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others", "2021", "2103.00020")  # fmt: skip
_CAPI = ("darcet2025capi", "Cluster and Predict Latent Patches for Improved Masked Image Modeling", "Darcet, Timothée "
         "and Baldassarre, Federico and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr",
         "2025", "2502.08769")  # fmt: skip
# By the layout of a conversion, or the objective of a recipe.
FAMILIES = {
    "dino": (_DINO,),
    "dinov2": (_DINOV2,),
    "dinov3": (_DINOV3,),
    "deit": (_DEIT, _DEIT3),
    "mae": (_MAE,),
    "simmim": (_SIMMIM,),
    "clip": (_CLIP,),
    "capi": (_CAPI,),
}


def citations_of(*families: str | None) -> list[str]:
    """BibTeX entries: the paper of registers first.

    Args:
        families: layout and source of the conversion, citation of the objective: BibTeX as it is, of any other text
            the longest known name in it.
    """
    papers: list = [_REGISTERS]
    for family in families:
        if (family or "").startswith("@"):
            papers.append(family)
            continue
        known = [name for name in FAMILIES if name in (family or "").lower()]
        papers += FAMILIES[max(known, key=len)] if known else ()
    return [paper if isinstance(paper, str) else _write(*paper) for paper in dict.fromkeys(papers)]


def _write(key: str, title: str, authors: str, year: str, number: str) -> str:
    fields = {"title": f"{{{title}}}", "author": authors, "year": year, "url": f"https://arxiv.org/abs/{number}"}
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@article{{{key},\n{lines}\n}}"


__all__ = ["FAMILIES", "citations_of"]
