"""Train a head: fine-tune a model below it, probe it, train from scratch, or learn from a teacher.

    accelerate launch examples/finetune.py --init outputs/demo-cpu                      # classes of built-in scenes
    accelerate launch examples/finetune.py --init outputs/demo-cpu --data my_photos     # a folder for each class
    accelerate launch examples/finetune.py --init outputs/demo-cpu --set settings.is_probe=true --output outputs/probe
    accelerate launch examples/finetune.py --init outputs/demo-cpu --set settings.lora_rank=4 --output outputs/lora
    accelerate launch examples/finetune.py --output outputs/scratch                     # from scratch
    accelerate launch examples/finetune.py --recipe deit3-vitb16 --data owner/dataset   # DeiT-III, many GPUs

Segmentation and depth are the same with another recipe; images and maps are cut together:

    accelerate launch examples/finetune.py --recipe segment-cpu --init outputs/demo-cpu # masks of built-in scenes
    accelerate launch examples/finetune.py --recipe depth-cpu --init outputs/demo-cpu
    accelerate launch examples/finetune.py --recipe segment-vitb14 --init my-dinov2 --data owner/ade20k \\
        --mask-column annotation --reduce-labels

Masks hold class numbers, 255 for none (--reduce-labels: 0 for none, and classes from 1). Depth is in metres, or in
units of --depth-scale metres. Folders of images name their masks in metadata.jsonl; see examples/README.md.

The loop, its robustness, its data and its instruments are those of pretrain.py; what differs is the recipe. The output
folder holds model/ for AutoModelForImageClassification, -SemanticSegmentation or -DepthEstimation.
"""

from pretrain import main


if __name__ == "__main__":
    main(description=__doc__, default_recipe="finetune-cpu")
