"""Train a classifier: fine-tune a model, probe it, train from scratch, or learn from a teacher.

    accelerate launch examples/finetune.py --init outputs/demo-cpu                      # the built-in scenes
    accelerate launch examples/finetune.py --init outputs/demo-cpu --data my_photos     # a folder for each class
    accelerate launch examples/finetune.py --init outputs/demo-cpu --set settings.is_probe=true --output outputs/probe
    accelerate launch examples/finetune.py --init outputs/demo-cpu --set settings.lora_rank=4 --output outputs/lora
    accelerate launch examples/finetune.py --output outputs/scratch                     # from scratch
    accelerate launch examples/finetune.py --recipe deit3-vitb16 --data owner/dataset   # DeiT-III, many GPUs

The loop, its robustness, its data and its instruments are those of pretrain.py; what differs is the recipe. The output
folder holds model/ for AutoModelForImageClassification and pipeline("image-classification").
"""

from pretrain import main


if __name__ == "__main__":
    main(description=__doc__, default_recipe="finetune-cpu")
