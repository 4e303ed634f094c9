"""Train a head: fine-tuning, linear probe, LoRA, training from scratch, distillation from a teacher.

    accelerate launch examples/finetune.py --init outputs/demo-cpu                      # classes of built-in scenes
    accelerate launch examples/finetune.py --init outputs/demo-cpu --data my_photos     # a folder for each class
    accelerate launch examples/finetune.py --init outputs/demo-cpu --output outputs/probe \\
        --set settings.freeze_backbone=true                                             # linear probe
    accelerate launch examples/finetune.py --init outputs/demo-cpu --set settings.lora_rank=4 --output outputs/lora
    accelerate launch examples/finetune.py --output outputs/scratch                     # from scratch
    accelerate launch examples/finetune.py --recipe deit3-vitb16 --data owner/dataset   # DeiT-III, many GPUs

Segmentation and depth need another recipe; images and maps are cropped together:

    accelerate launch examples/finetune.py --recipe segment-cpu --init outputs/demo-cpu # masks of built-in scenes
    accelerate launch examples/finetune.py --recipe depth-cpu --init outputs/demo-cpu
    accelerate launch examples/finetune.py --recipe segment-vitb14 --init my-dinov2 --data owner/ade20k \\
        --columns mask=annotation --set data.reduce_labels=true

Masks hold class numbers; 255 is ignored (data.reduce_labels: 0 is ignored, classes count from 1). Depth is in metres,
or in units of data.depth_scale metres. Folders name their masks in metadata.jsonl; see docs/data/annotations.md.

The loop is that of pretrain.py, with another recipe. The output folder holds model/, which loads by
AutoModelForImageClassification, -SemanticSegmentation or -DepthEstimation.
"""

from pretrain import main


if __name__ == "__main__":
    main(description=__doc__, default_recipe="finetune-cpu")
