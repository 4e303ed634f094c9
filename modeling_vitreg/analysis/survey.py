"""From an encoder and images to an `ArtifactReport`, in one pass over the images and in constant memory.

Each image goes through the model once for norms, positions and activations. Attention and ablation, which run the
model again, use the first images; probes use tokens that were kept of the first images. Each number states how many
images it comes from.

A pass that stops early (Ctrl-C, a full disk, a device without memory) reports what was measured until then, and why it
stopped. A section that cannot be measured states the reason, and the others are measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.encoding import Consumer, run_pass
from modeling_vitreg.features import Encoder
from modeling_vitreg.reports import ArtifactReport

from .histograms import EDGES
from .sections import Sections
from .settings import Examples, SurveySettings
from .verdict import RULES


def survey(
    encoder: Encoder,
    images: object,
    *,
    settings: SurveySettings | None = None,
    source: str = "",
    command: str = "",
    context: DistributedContext = SINGLE_PROCESS,
    others: Sequence[Consumer] = (),
) -> tuple[ArtifactReport, Examples] | None:
    """Measure the artifacts of a model.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: anything that `ImageReader` reads.
        settings: how much is measured.
        source: name of the images, for the report.
        command: command that makes the report, for the report.
        context: processes that share the images.
        others: what else is measured in the same pass.

    Returns:
        The report, and the first images with their norms and attention; None in all processes but the first.

    Raises:
        ValueError: no image can be read, or the images do not fit the model.
    """
    settings = settings or SurveySettings()
    sections = Sections(encoder, settings)
    reading = {"context": context, "failures": sections.failures}
    counts = run_pass(encoder, images, [sections, *others], settings.reading(), **reading)
    if context.rank:
        return None
    if not counts.num_seen:
        raise ValueError(
            f"expected at least one readable image, got {len(counts.unreadable)} unreadable ones"
            + "".join(f"\n  {line}" for line in list(counts.unreadable.values())[:3])
            + (f"\n  {counts.stopped_by}" if counts.stopped_by else "")
        )
    (size,) = counts.sizes
    grid = [side // patch for side, patch in zip(size, encoder.patch_shape)]
    details = {"source": source, **counts.describe(), "size": list(size), "grid": grid}
    report = ArtifactReport(
        model=encoder.name,
        architecture=encoder.describe(),
        images=details,
        bins={"edges": [float(edge) for edge in EDGES], "rules": RULES},
        command=command,
        made_with={**encoder.made_with(), "precision": counts.precision, "num_processes": context.size},
        **sections.compute(counts.num_seen),
    )
    return report, sections.examples
