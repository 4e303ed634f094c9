"""Self-supervised training of ViTs with registers: the pure parts; the loop is `examples/pretrain.py`."""
