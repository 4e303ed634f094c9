"""Time the scan of Mamba-R and its gradients beside autograd through a plain loop, and by the number of tokens.

    python benchmarks/scan.py

The first table has one direction of a layer of Mamba-R-S on images of 224 pixels. The programs take turns, so that a
machine that changes its speed changes it for all. A ratio is the median over the rounds of time / time of ours,
with its smallest and largest value. Memory is what autograd keeps for the backward pass, every tensor counted once.
The second table has ours alone: time and memory are linear if what they cost for a token stays the same.
float32, random values, CPU or the first GPU.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from modeling_vitreg.mamba_vitreg import selective_scan


WIDTH, STATES = 768, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences at a time (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all programs (default 5)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"batch {options.batch_size}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    programs = {"ours": selective_scan, "plain loop": plain_loop}
    parts = make_inputs(options.batch_size, 208, device)
    for kind in ("forward", "forward and backward"):
        times = measure(programs, parts, options.rounds, is_training=kind != "forward")
        for name, seconds in times.items():
            ratios = [theirs / ours for theirs, ours in zip(seconds, times["ours"])]
            shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{kind:20} {name:10} {statistics.median(seconds):7.3f} s   {shown}")
    for name, program in programs.items():
        print(f"kept for backward    {name:10} {kept_bytes(program, parts) / 2**20:7.1f} MiB")
    for num_tokens in (256, 512, 1024, 2048, 4096):
        parts = make_inputs(1, num_tokens, device)
        seconds = statistics.median(measure({"ours": selective_scan}, parts, options.rounds)["ours"])
        kept = kept_bytes(selective_scan, parts)
        cost = f"{seconds / num_tokens * 1e6:6.1f} us and {kept / num_tokens / 1024:5.1f} KiB"
        print(f"{num_tokens:5} tokens   {cost} each")


def plain_loop(inputs, steps, decay, write, read):
    """The recurrence as its formula says, for autograd."""
    state, outputs = 0.0, []
    for token in range(inputs.shape[1]):
        step = steps[:, token, :, None]
        state = torch.exp(step * decay) * state + step * inputs[:, token, :, None] * write[:, token, None]
        outputs.append((state * read[:, token, None]).sum(dim=-1))
    return torch.stack(outputs, dim=1)


def make_inputs(batch_size: int, num_tokens: int, device: str) -> list:
    """Inputs, steps, decay, write and read of a scan."""
    torch.manual_seed(0)
    tokens = (batch_size, num_tokens)
    shapes = [(*tokens, WIDTH), (*tokens, WIDTH), (WIDTH, STATES), (*tokens, STATES), (*tokens, STATES)]
    parts = [torch.randn(shape, device=device) for shape in shapes]
    parts[1], parts[2] = F.softplus(parts[1] - 4), -parts[2].exp()
    return [part.requires_grad_() for part in parts]


def measure(programs: dict, parts: list, rounds: int, *, is_training: bool = True) -> dict:
    """Seconds of each program in each round, after one round that does not count."""
    times = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(is_training):
                total = program(*parts).sum()
            if is_training:
                torch.autograd.grad(total, parts)
            if total.is_cuda:
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def kept_bytes(program, parts: list) -> int:
    """Bytes that autograd keeps between forward and backward."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = program(*parts)  # keeps every storage alive, so that no address counts for two
    del output
    return sum(kept.values())


if __name__ == "__main__":
    main()
