"""Damaged and hostile checkpoints and model folders, made from a seed: what other people's disks may hold.

`python hostile_checkpoints.py FOLDER COUNT SEED [KIND ...]` makes and converts COUNT of them, at least one of each
kind, and prints one JSON object a line: kind, seconds, outcome ("refused", "converted", "crashed"), message, peak of
memory in MiB, and `is_same`: whether the weights are those of the undamaged file.
"""

import json
import math
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile

import official_layouts as official
import torch
from safetensors.torch import load_file, save, save_file


STATE = official.fill(official.dinov2(32, 2, side=4, num_registers=4))
NAMES = sorted(STATE)
SECONDS = 20
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
DINOV2 = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "mlp_ratio": 4, **SIZES}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


class Runs:
    """Leaves a file when it is unpickled by a reader that allows it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Maker:
    """Writes one hostile source; each method without underscore is a kind, and returns what may be converted.

    Kinds named `harmless_...` may succeed, but only with the weights of the original. All others have to be refused.

    Args:
        folder: empty folder to write into.
        seed: of the choices.
    """

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.ran = folder / "ran"

    def _save(self, content, name="dinov2.pth", **options) -> pathlib.Path:
        torch.save(content, self.folder / name, **options)
        return self.folder / name

    def _changed(self, change, *, name=None, count=1) -> pathlib.Path:
        state = dict(STATE)
        for key in [name] if name else self.random.sample(NAMES, count):
            state[key] = change(state[key])
        return self._save(state)

    # Bytes

    def harmless_flip_in_an_archive(self):
        path = self._save(STATE)
        content = bytearray(path.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        return path

    def flip_in_the_data_of_an_archive(self):
        path = self._save(STATE)
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            entry = self.random.choice([one for one in archive.infolist() if "/data/" in one.filename])
            with archive.open(entry) as stream:
                start = content.index(stream.read(24), entry.header_offset)
        content[start + self.random.randrange(entry.file_size)] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        return path

    def harmless_flip_in_a_header(self):
        path, content = self.folder / "dinov2.safetensors", bytearray(save(STATE))
        content[self.random.randrange(8 + int.from_bytes(content[:8], "little"))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        return path

    def truncated(self):
        kind = self.random.choice([".pth", ".safetensors", ".old"])
        path = self.folder / f"dinov2{kind.replace('.old', '.pth')}"
        if kind == ".safetensors":
            save_file(STATE, path)
        else:
            torch.save(STATE, path, _use_new_zipfile_serialization=kind == ".pth")
        content = path.read_bytes()
        path.write_bytes(content[: self.random.randrange(len(content) - 1)])
        return path

    def noise(self):
        path = self.folder / self.random.choice(["a.pth", "a.safetensors", "a.bin"])
        start = self.random.choice([b"", b"PK\x03\x04", b"\x80\x02", b"<!DOCTYPE html>", b"version https://git-lfs"])
        path.write_bytes(start + self.random.randbytes(self.random.choice([0, 3, 500, 5000])))
        return path

    def header_of_safetensors(self):
        full = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        huge = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 8]}
        texts = [
            json.dumps({"a": huge}),
            json.dumps({"a": {**full, "shape": [-1, -2]}}),
            json.dumps({"a": {**full, "dtype": "F7"}}),
            json.dumps({"a": {**full, "data_offsets": [8, 0]}}),
            json.dumps({"a": {**full, "data_offsets": [0, 2**60]}}),
            json.dumps({"a": full, "b": full}),
            '{"a": ' + json.dumps(full) + ', "a": ' + json.dumps(full) + "}",
            "[" * 10_000,
            json.dumps([1, 2]),
            json.dumps({"a": {**full, "shape": [1] * 70 + [2]}}),
        ]
        header = self.random.choice(texts).encode()
        length = self.random.choice([len(header)] * 4 + [2**63, 2**40, 3])
        path = self.folder / "dinov2.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header + bytes(8))
        return path

    def bomb(self):
        path = self.folder / "bomb.pth"
        with zipfile.ZipFile(path, "w", self.random.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])) as archive:
            archive.writestr("bomb/data.pkl", pickle.dumps({}))
            for number in range(self.random.randrange(1, 4)):
                archive.writestr(f"bomb/data/{number}", bytes(2**26))
        return path

    # Pickles

    def code(self):
        bad = self.random.choice(
            [
                Runs(os.system, f"touch {self.ran}"),
                Runs(eval, f"open({str(self.ran)!r}, 'w')"),
                Runs(exec, f"open({str(self.ran)!r}, 'w')"),
                Runs(pathlib.Path.touch, pathlib.Path(self.ran)),
                Runs(shutil.copy, "/etc/hostname", str(self.ran)),
            ]
        )
        content = self.random.choice(
            [lambda: {**STATE, "extra": bad}, lambda: bad, lambda: {"model": STATE, "args": bad}]
        )
        is_archive = self.random.random() < 0.6
        if self.random.random() < 0.3:
            (self.folder / "dinov2.pth").write_bytes(pickle.dumps({"cls_token": bad}, protocol=2))
            return self.folder / "dinov2.pth"
        return self._save(content(), _use_new_zipfile_serialization=is_archive)

    def code_in_torchscript(self):
        path = self.folder / "clip.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("clip/data.pkl", pickle.dumps(Runs(os.system, f"touch {self.ran}"), protocol=2))
            archive.writestr("clip/constants.pkl", pickle.dumps(()))
        return path

    def torchscript_of_another_model(self):
        path = self.folder / "script.pt"
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2)).save(str(path))
        if self.random.random() < 0.5:
            with zipfile.ZipFile(path) as old, zipfile.ZipFile(self.folder / "new.pt", "w") as new:
                for entry in old.infolist():
                    content = old.read(entry)
                    cut = entry.filename.endswith("data.pkl") and len(content) // 2
                    new.writestr(entry.filename, content[: cut or None])
            return self.folder / "new.pt"
        return path

    def other_content(self):
        return self._save(self.random.choice([[1, 2], torch.ones(3), 7, None, "text", {}, {"a": 1}, {"model": {}}]))

    def odd_keys(self):
        odd = self.random.choice([7, ("a", "b"), "x" * 100_000, "a\nb", "\x1b[31mred", 2.5, None, True])
        return self._save({**STATE, odd: torch.ones(2)})

    def cycles_and_depth(self):
        kind, state = self.random.randrange(4), dict(STATE)
        if kind == 0:
            state["model"] = state
        elif kind == 1:
            inner = {"a": torch.ones(2)}
            for _ in range(100):
                inner = {"model": inner}
            state = inner
        elif kind == 2:
            one: dict = {}
            one["model"] = {"state_dict": one, "a": torch.ones(1)}
            state = one
        else:
            for number in range(40):
                state = {"a": state, "b": state, f"c{number}": torch.ones(1)}
        return self._save(state)

    # Tensors

    def types_of_weights(self):
        kinds = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.int32, torch.float8_e4m3fn]
        dtype = self.random.choice(kinds)
        return self._changed(lambda tensor: tensor.to(dtype), count=self.random.choice([1, len(NAMES)]))

    def layouts_of_tensors(self):
        kind = self.random.randrange(6)
        flat = self.random.choice([name for name in NAMES if STATE[name].ndim == 2])
        changes = [
            lambda tensor: tensor.to_sparse(),
            lambda tensor: tensor.to_sparse_csr(),
            lambda tensor: tensor.to("meta"),
            lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[0]]),
            lambda tensor: torch.zeros(0, *tensor.shape[1:]),
        ]
        warnings.simplefilter("ignore")
        return self._changed(changes[kind], name=flat)

    def not_finite(self):
        def change(tensor):
            tensor = tensor.clone()
            value = self.random.choice([math.nan, math.inf, -math.inf])
            tensor.view(-1)[self.random.randrange(tensor.numel())] = value
            return tensor

        return self._changed(change)

    def missing_or_renamed(self):
        state = dict(STATE)
        name = self.random.choice([name for name in NAMES if name != "register_tokens"])
        tensor = state.pop(name)
        if self.random.random() < 0.5:
            state[name.upper()] = tensor
        return self._save(state)

    def layers(self):
        number = self.random.choice(["99999999999", "2000000", "9" * 5000, "7", "00", "-1", "\u0663"])
        state = dict(STATE)
        for name in list(STATE):
            if name.startswith("blocks.1."):
                state[name.replace("blocks.1.", f"blocks.{number}.")] = state.pop(name)
        return self._save(state)

    def claims_more_than_it_holds(self):
        shape = self.random.choice([(10**6, 10**6), (2**20, 512), (3, 2**24)])
        if self.random.random() < 0.5:
            return self._changed(lambda tensor: torch.zeros(1).expand(*shape))
        return self._save({f"blocks.{i}.attn.qkv.weight": torch.zeros(1).expand(30_000, 10_000) for i in range(200)})

    def shapes(self):
        def change(tensor):
            return self.random.choice(
                [lambda: tensor.unsqueeze(0), lambda: tensor.reshape(-1), lambda: torch.cat([tensor, tensor])]
            )()

        return self._changed(change, name=self.random.choice([name for name in NAMES if STATE[name].ndim > 1]))

    def many_tensors(self):
        return self._save({f"blocks.{i}.norm1.weight": torch.ones(1) for i in range(10_001)})

    def all_zero(self):
        return self._save({name: torch.zeros_like(tensor) for name, tensor in STATE.items()})

    # Folders of transformers

    def _folder(self, changes=None, *, config=None, processor=None) -> pathlib.Path:
        import transformers

        folder = self.folder / "model"
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES))
        model.save_pretrained(folder)
        settings = {**json.loads((folder / "config.json").read_text()), **(changes or {})}
        (folder / "config.json").write_text(config if config is not None else json.dumps(settings))
        if processor is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    def sizes_of_a_config(self):
        name = self.random.choice(sorted(SIZES))
        value = self.random.choice([10**6, 10**12, -1, 0, 1.5, "32", [1, 2, 3], None, True, {"a": 1}, 33, math.nan])
        return self._folder({name: value})

    def types_of_a_config(self):
        changes = [
            {"model_type": ["dinov2"]},
            {"model_type": {"a": 1}},
            {"model_type": "swin"},
            {"model_type": 7},
            {"architectures": "Dinov2Model"},
            {"architectures": [7]},
            {"mlp_ratio": "4"},
            {"layerscale_value": [1]},
            {"use_swiglu_ffn": True},
            {"hidden_act": "no_such"},
            {"hidden_act": {"a": 1}},
            {"layer_norm_eps": "small"},
        ]
        return self._folder(self.random.choice(changes))

    def harmless_architectures(self):
        names = [None, [], ["pipeline"], ["AutoModelForCausalLM"], ["../evil"], ["__builtins__"], ["ViTModel"]]
        changes = {"architectures": self.random.choice(names), "_name_or_path": "/etc/passwd"}
        return self._folder(changes | {"auto_map": {"AutoModel": "evil.Model"}})

    def text_of_a_config(self):
        texts = ["[1, 2]", '"text"', "7", "null", "{", "[" * 100_000, '{"a": ' * 50_000, "\ud800", "1" * 100_000]
        texts += ['{"model_type": "dinov2", "model_type": "vit"}', " " * (2**24 + 10), "NaN"]
        folder = self._folder()
        (folder / "config.json").write_text(self.random.choice(texts), encoding="utf-8", errors="surrogatepass")
        return folder

    def processors(self):
        good = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 56, "width": 56}, "resample": 3}
        bad = [
            {"image_mean": "x"},
            {"image_mean": [math.nan] * 3},
            {"image_std": [0.0, 1.0, 1.0]},
            {"image_std": [math.inf] * 3},
            {"image_mean": [0.5] * 5, "image_std": [0.5] * 5},
            {"image_mean": None},
            {"image_mean": [True] * 3},
            {"size": "large"},
            {"size": {"height": -1}},
            {"size": 10**9},
            {"resample": "bicubic"},
            {"resample": 77},
            {"rescale_factor": math.nan},
            {"do_center_crop": "yes"},
        ]
        return self._folder(processor={**good, **self.random.choice(bad)})

    def maps_of_weights(self):
        folder = self._folder()
        shutil.copy(folder / "model.safetensors", self.folder / "outside.safetensors")
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        names = list(load_file(folder / "a.safetensors"))
        target = self.random.choice(
            [
                "../outside.safetensors",
                str(self.folder / "outside.safetensors"),
                "..\\outside.safetensors",
                "b.safetensors",
            ]
        )
        maps = [{"weight_map": dict.fromkeys(names, target)}, {"weight_map": []}, {"weight_map": {"a": 7}}, {}, []]
        index = self.random.choice([maps[0]] * 4 + maps[1:])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def twice_in_shards(self):
        folder = self._folder()
        shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        names = list(load_file(folder / "a.safetensors"))
        index = {name: self.random.choice(["a.safetensors", "b.safetensors"]) for name in names[:-2]}
        index |= {names[-2]: "a.safetensors", names[-1]: "b.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    # Folders of timm

    def folders_of_timm(self):
        import timm

        folder = self.folder / "timm"
        folder.mkdir()
        save_file(
            timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM).state_dict(), folder / "model.safetensors"
        )
        evil = folder / "extra.bin"
        torch.save({"a": Runs(os.system, f"touch {self.ran}")}, evil)
        name, changes = self.random.choice(
            [
                ("vit_tiny_patch16_224", {"checkpoint_path": str(evil)}),
                ("vit_tiny_patch16_224", {"pretrained_cfg": {"file": str(evil)}}),
                ("vit_tiny_patch16_224", {"pretrained_cfg_overlay": {"file": str(evil)}}),
                ("vit_tiny_patch16_224", {"depth": 10**6}),
                ("vit_tiny_patch16_224", {"depth": 3}),
                ("vit_tiny_patch16_224", {"embed_dim": 10**9}),
                ("vit_tiny_patch16_224", {"embed_dim": "wide"}),
                ("vit_tiny_patch16_224", {"img_size": 10**8}),
                ("vit_tiny_patch16_224", {"device": "cuda"}),
                ("vit_tiny_patch16_224", {"act_layer": "os.system"}),
                ("vit_tiny_patch16_224", [1]),
                ("vit_7b_patch16_dinov3", {}),
                ("no_such_model", {}),
                ("hf-hub:evil/model", {}),
                (f"local-dir:{folder}", {}),
                ("../../evil", {}),
                ("resnet18", {}),
                (["vit_tiny_patch16_224"], {}),
            ]
        )
        arguments = {**TIMM, **changes} if isinstance(changes, dict) and name == "vit_tiny_patch16_224" else changes
        settings = {"architecture": name, "num_classes": 0, "model_args": arguments}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    # Places

    def places(self):
        kind = self.random.randrange(4)
        path = self.folder / "a.pth"
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.symlink_to(path)
        elif kind == 2:
            path.mkdir()
        else:
            (self.folder / "b").mkdir()
            os.mkfifo(self.folder / "b" / "config.json")
            os.mkfifo(self.folder / "b" / "model.safetensors")
            return self.folder / "b"
        return path


KINDS = sorted(name for name in vars(Maker) if not name.startswith("_"))


def convert_one(kind: str, folder: pathlib.Path, seed: int) -> dict:
    """Make one and convert it.

    Args:
        kind: one of `KINDS`.
        folder: empty folder.
        seed: of its choices.
    """
    from modeling_vitreg.conversion import ConversionError, ConversionSettings, convert

    maker = Maker(folder, seed)
    source = getattr(maker, kind)()
    settings = ConversionSettings(config_overrides={"num_attention_heads": 2}, is_quiet=True)
    start, message = time.perf_counter(), ""
    signal.alarm(SECONDS)
    try:
        convert(source, folder / "out", settings=settings)
        outcome = "converted"
    except ConversionError as error:
        outcome, message = "refused", str(error)
    except BaseException as error:
        outcome, message = "crashed", f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
    found = {"kind": kind, "seed": seed, "seconds": round(time.perf_counter() - start, 2), "outcome": outcome}
    found |= {
        "message": message,
        "ran": maker.ran.exists(),
        "is_clean": outcome == "converted" or not (folder / "out").exists(),
    }
    if outcome == "converted" and kind.startswith("harmless_"):
        found["is_same"] = _is_same(source, folder / "out")
    return found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def _is_same(source: pathlib.Path, output: pathlib.Path) -> bool:
    found = load_file(output / "model.safetensors")
    if source.is_dir():
        expected = load_file(source / "model.safetensors")
        return torch.equal(found["layernorm.weight"], expected["layernorm.weight"])
    pairs = {"norm.weight": "layernorm.weight", "blocks.1.attn.qkv.weight": "layers.1.attention.qkv.weight"}
    pairs |= {
        "blocks.0.mlp.fc1.weight": "layers.0.mlp.fc1.weight",
        "pos_embed": "embeddings.position_embeddings.weight",
    }
    return all(torch.equal(found[ours], STATE[theirs]) for theirs, ours in pairs.items())


def main(folder: str, count: str, seed: str, *kinds: str) -> None:
    """Convert many, each in a folder of its own, which is removed afterwards."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    names = list(kinds) or KINDS
    for number in range(max(int(count), len(names))):
        place = pathlib.Path(folder) / str(number)
        place.mkdir(parents=True)
        found = convert_one(names[number % len(names)], place, 1000 * int(seed) + number)
        print(json.dumps(found), flush=True)
        shutil.rmtree(place, ignore_errors=True)


def _too_long(*_):
    raise TimeoutError(f"took more than {SECONDS} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
