"""Opens a file that tools.export wrote, to predict with it: ONNX by onnxruntime; PyTorch's exported program is refused.

No code from a file is executed. An ONNX file is a list of known operators, so it is safe to run. torch.export.load
unpickles parts of a `.pt2` and evaluates text in it, which is safe only for those who made the file: not here.
"""
from __future__ import annotations

import json
import math
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from utils.errors import ConfigError, brief

#: Keys of `preprocess`, see data_loader.transforms.test_preprocess.
_SIZES, _TRIPLES = ("image_size", "resize"), ("mean", "std")


def is_exported(path: str) -> str | None:
    """"onnx" or "pt2" by the file's extension, or "pt2" by what is in it; None for anything else."""
    kind = Path(path).suffix.lower()
    if kind in (".onnx", ".pt2"):
        return kind[1:]
    try:
        with zipfile.ZipFile(path) as archive:
            return "pt2" if any(name.endswith("/archive_format") for name in archive.namelist()) else None
    except (OSError, zipfile.BadZipFile):
        return None


def session_of(path: str | Path, threads: int) -> Any:
    """onnxruntime's session for a file, on so many CPU threads. Raises ConfigError: no onnxruntime, unreadable file."""
    if find_spec("onnxruntime") is None:
        raise ConfigError(f"{path}: an ONNX file needs the package onnxruntime; pip install onnxruntime")
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every reason
        raise ConfigError(f"{path}: onnxruntime can't read it as a model ({brief(error)}); give the file that "
                          "tools.export wrote, or the checkpoint") from None


class OnnxModel(torch.nn.Module):
    """An exported classifier as a model: images [N, 3, H, W] -> {"output": logits [N, C]}, on the CPU.

    `preprocess` and `class_names` are those of the file's metadata. Raises ConfigError where the file has none that
    fit its input and output, e.g. because another program exported it.
    """

    num_experts = 1  # how many there were isn't in the file

    def __init__(self, path: str | Path):
        super().__init__()
        self.session = session_of(path, torch.get_num_threads())
        about = self.session.get_modelmeta().custom_metadata_map
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        try:
            self.preprocess, self.class_names = (json.loads(about[key]) for key in ("preprocess", "class_names"))
            fits = _fits(self.preprocess, self.class_names, inputs, outputs)
        except (KeyError, ValueError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise ConfigError(f"{path}: an ONNX file without the `preprocess` and `class_names` that tools.export puts "
                              "into its metadata, so how to feed it isn't known; export the checkpoint with python -m "
                              "tools.export")

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images: float32, normalised as `preprocess` says."""
        found, = self.session.run(["output"], {"images": images.cpu().contiguous().numpy()})
        return {"output": torch.from_numpy(found)}


def _fits(preprocess: dict[str, Any], names: list[str], inputs: list[Any], outputs: list[Any]) -> bool:
    """Whether metadata are as tools.export writes them, and match the model's input and output."""
    size = preprocess["image_size"]
    numbers = [value for key in _TRIPLES for value in preprocess[key]]
    return ([len(preprocess[key]) for key in _TRIPLES] == [3, 3]
            and all(type(preprocess[key]) is int for key in _SIZES) and type(preprocess["crop"]) is bool
            and all(math.isfinite(value) for value in numbers) and all(preprocess["std"])
            and preprocess["interpolation"] in ("bilinear", "bicubic") and 0 < size <= preprocess["resize"] <= 2 * size
            and all(isinstance(name, str) for name in names)
            and [(item.name, item.type, item.shape[1:]) for item in inputs] == [
                ("images", "tensor(float)", [3, size, size])]
            and [(item.name, item.shape[1:]) for item in outputs] == [("output", [len(names)])])


def open_exported(path: str, kind: str) -> OnnxModel:
    """An exported file as a model. Raises ConfigError for one that can't be run here."""
    if kind == "pt2":
        raise ConfigError(f"{path}: an exported program (torch.export.save), which can run code while it is loaded, so "
                          "it isn't opened here; give the checkpoint it was exported from, or export that with "
                          "--format onnx")
    return OnnxModel(path).eval()
