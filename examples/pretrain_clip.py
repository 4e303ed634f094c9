"""Pretrain an image tower with registers on captions, beside a text tower of transformers.

    accelerate launch examples/pretrain_clip.py                                        # built-in scenes and captions
    accelerate launch examples/pretrain_clip.py --data owner/dataset --columns text=text
    accelerate launch examples/pretrain_clip.py --recipe clip-vitb16 --data "shards/{000..099}.tar" --columns text=txt

The loop is that of pretrain.py, with another recipe. The output folder holds model/: a dual encoder with code,
tokenizer and image processor, for zero-shot classification:

    from transformers import pipeline
    classify = pipeline("zero-shot-image-classification", "outputs/clip-cpu/model", trust_remote_code=True)
    classify("photograph.jpg", candidate_labels=["red ball", "blue cube"])
"""

from pretrain import main


if __name__ == "__main__":
    main(description=__doc__, default_recipe="clip-cpu")
