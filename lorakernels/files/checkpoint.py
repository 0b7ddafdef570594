"""A model's folder of safetensors, and the same with an adapter merged in, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorakernels.files import reading
from lorakernels.files.reading import AdapterFileError, as_file_error, open_weights, read_json, write_json
from lorakernels.files.update import Update, of_kernel
from lorakernels.quant import nf4
from lorakernels.quant.packed import Form, PackedWeight

INDEX_SUFFIX = ".safetensors.index.json"
# safetensors' names of the dtypes that a merge can read and write.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BYTES = {"C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
# Their linear layers are transformers' Conv1D, whose weight is [in, out].
_CONV1D_MODELS = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
# What a quantised weight has beside it, in the formats of bitsandbytes, GPTQ, AWQ, fp8 and MLX.
_QUANT_STATE = ("qweight", "qzeros", "scales", "SCB", "weight_scale", "weight_scale_inv", "weight_packed")
_QUANTISED = ("quantization_config", "quantization")  # in config.json
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")

Changes = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, and its shape and dtype in safetensors' words ("BF16")."""

    shard: str
    shape: torch.Size
    dtype: str


class Checkpoint:
    """The tensors of a folder with one .safetensors file, or several and their index.

    Reads headers only, and of weights in 4 bits, which are checked, one at a time.

    `tensors` is by name, `shards` the files of these, `config` what config.json holds (empty without one). A weight
    that bitsandbytes has packed into 4 bits is one tensor, of the shape and dtype that it had; `packed` has its form.

    Raises AdapterFileError when there is none, one is broken, or the index and the shards disagree.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise AdapterFileError(f"{self.folder} is not a folder; expected a model's, with safetensors")
        here = sorted(os.listdir(self.folder))
        self.config: dict[str, Any] = read_json(self.folder / "config.json") if "config.json" in here else {}
        indices = [name for name in here if name.endswith(INDEX_SUFFIX)]
        single = [name for name in here if name.endswith(".safetensors")]
        if len(indices) > 1 or (not indices and len(single) != 1):
            self._refuse(here, len(single))
        self.index_file = indices[0] if indices else None
        weight_map = weight_map_of(self.folder / indices[0]) if indices else {}
        self.tensors: dict[str, TensorInfo] = {}
        self._records: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for shard in sorted(set(weight_map.values())) or single:
            with open_weights(self.folder / shard) as file:
                self.metadata[shard] = file.metadata() or {"format": "pt"}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {n: TensorInfo(shard, torch.Size(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
                self._records |= {n.partition(nf4.RECORD)[0]: file.get_tensor(n) for n in found if nf4.RECORD in n}
            twice = next((name for name in found if name in self.tensors), None)
            if twice is not None:
                raise AdapterFileError(f"{self.folder}: {twice} is in {self.tensors[twice].shard} and {shard}")
            self.tensors |= found
        places = {name: info.shard for name, info in self.tensors.items()}
        wrong = sorted(name for name in {**weight_map, **places} if weight_map.get(name) != places.get(name))
        if indices and wrong:
            raise AdapterFileError(f"{self.folder / indices[0]} and its shards disagree on {len(wrong)}: {wrong[0]}")
        self._stored, self.packed = self.tensors, dict[str, Form]()
        self.tensors = {name: info for name, info in self._stored.items() if nf4.RECORD not in name}
        with self.reader() as read:
            for name, record in self._records.items():
                with as_file_error(f"{self.folder}: {name}", RecursionError):
                    self._unite(name, nf4.saved_form(record))
                    read(name)
        self.shards = sorted({info.shard for info in self.tensors.values()}) or single

    def _unite(self, name: str, form: Form) -> None:
        """Let the tensors of a packed weight be one, as the weight was."""
        if name not in self.tensors or form.dtype not in _NAMES:
            raise ValueError(f"{form}, without numbers or of no dtype of {', '.join(DTYPES)}")
        for part in nf4.PARTS:
            self.tensors.pop(f"{name}.{part}", None)
        shape = torch.Size((form.N, form.K))
        self.tensors[name] = TensorInfo(self.tensors[name].shard, shape, _NAMES[form.dtype])
        self.packed[name] = form

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Any]]:
        """In the block, what gives a tensor by its name: one of the file's, of a packed weight a `PackedWeight`.

        Not with open_weights: what goes wrong in writing is no fault of the file that is read.
        """
        with ExitStack() as stack:

            @cache
            def opened(shard: str) -> Any:
                return stack.enter_context(safe_open(self.folder / shard, framework="pt"))

            def stored(name: str) -> torch.Tensor:
                return opened(self._stored[name].shard).get_tensor(name)

            def read(name: str) -> Any:
                if name not in self.packed:
                    return stored(name)
                parts = {part: stored(f"{name}.{part}") for part in nf4.PARTS if f"{name}.{part}" in self._stored}
                return nf4.read_saved(stored(name), self._records[name], parts)

            yield read

    def _refuse(self, here: list[str], number: int) -> None:
        parts = [name for name in here if any((self.folder / name).glob("*.safetensors"))]
        mend = reading.mend_of_pickles(here)
        if "model_index.json" in here and parts:
            mend = f"; this is a pipeline: give one of its parts ({', '.join(parts)})"
        raise AdapterFileError(
            f"{self.folder} has {number} .safetensors files and no single index; expected one file, "
            f"or several with a *{INDEX_SUFFIX}{mend}"
        )

    def check_holds(self, name: str, shape: torch.Size, what: str) -> TensorInfo:
        """A tensor's place; raises AdapterFileError, saying `what` the adapter does, unless it has this shape."""
        info = self.tensors.get(name)
        if info is None or info.shape != shape:
            found = "no such tensor" if info is None else list(info.shape)
            raise AdapterFileError(
                f"the adapter {what} {name} {list(shape)}, and {self.folder} has {found}; expected the model that it "
                "was trained on, saved with its new layers"
            )
        return info

    @property
    def transposed(self) -> bool:
        """Whether the weights of its linear layers are [in, out], but for a head's."""
        return self.config.get("model_type") in _CONV1D_MODELS

    def fitted(self, module: str, update: Update, fan_in_fan_out: bool = False) -> Update:
        """An update with as many dimensions as its weight; raises as `check_holds` does unless that has its shape."""
        weight = f"{module}.weight"
        if weight in self.tensors and not update.embedding:
            update = replace(update, tensors=of_kernel(update.tensors, self.tensors[weight].shape[2:]))
        self.check_holds(weight, update.shape[::-1] if fan_in_fan_out else update.shape, "updates")
        return update

    def quantised(self, module: str) -> str | None:
        """Why the weight of a module is taken for a quantised one, or None."""
        config = next((self.config[name] for name in _QUANTISED if self.config.get(name)), None)
        if config:
            method = config.get("quant_method", "quantised") if isinstance(config, dict) else config
            if not (self.packed and method == "bitsandbytes"):
                return f"config.json says {method}"
        weight = f"{module}.weight"
        beside = [f"{module}.{name}" for name in _QUANT_STATE if f"{module}.{name}" in self.tensors]
        beside += [name for name in (f"{weight}.absmax", f"{weight}.quant_map") if name in self.tensors]
        if beside:
            return f"it has {beside[0]}"
        info = self.tensors.get(weight)
        return f"it is {info.dtype}" if info is not None and info.dtype not in DTYPES else None


def weight_map_of(path: Path) -> dict[str, str]:
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterFileError(f"{path} has no weight_map; expected an object of tensor names and files")
    if metadata is not None and not isinstance(metadata, dict):
        raise AdapterFileError(f"{path} has metadata={str(metadata)[:80]}; expected an object, or none")
    for shard in set(weight_map.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise AdapterFileError(f"{path} names the file {shard!r}; expected a .safetensors file beside it")
        if not (path.parent / shard).is_file():
            raise AdapterFileError(f"{path} names {shard}, which is not there; download the missing shards")
    return weight_map


@contextmanager
def new_folder(out: str | os.PathLike[str], sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, or disappears with an error: `out` is whole or not there.

    Raises AdapterFileError where `out` is one of `sources` or the current folder, or exists and is not an empty one.
    """
    out = Path(out).resolve()  # "." and ".." have no name and no parent of their own
    if any(out == source.resolve() for source in sources):
        raise AdapterFileError(f"{out} is what is read; expected another folder to write to")
    if out == Path.cwd():
        raise AdapterFileError(f"{out} is the current folder, which cannot be replaced; expected a new one")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise AdapterFileError(f"{out} exists and is not an empty folder; expected a new one, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_changed(
    checkpoint: Checkpoint, folder: Path, changes: Changes, dtype: torch.dtype | None = None, progress: bool = False
) -> None:
    """Write `checkpoint` into `folder` with some tensors changed: same shards, index, and the small files beside.

    One tensor is in memory at a time, beside the pages of the shard it is read from. A change gets the tensor as it
    is stored; its result is rounded to the stored dtype, or to `dtype`, which every float tensor then gets.

    Raises AdapterFileError when a result is not finite.
    """
    from tqdm import tqdm

    shards = tqdm(checkpoint.shards, desc="shards", unit="shard", disable=None if progress else True)
    total = sum(_write_shard(checkpoint, shard, folder, changes, dtype) for shard in shards)
    if checkpoint.index_file is not None:
        index = read_json(checkpoint.folder / checkpoint.index_file)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        index["weight_map"] = {
            name: checkpoint.tensors[name].shard for name in index["weight_map"] if name in checkpoint.tensors
        }
        write_json(folder / checkpoint.index_file, index)
    for path in checkpoint.folder.iterdir():
        is_weights = path.name.endswith((*_WEIGHT_FILES, ".index.json"))
        if path.is_file() and not is_weights and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    config = {name: value for name, value in checkpoint.config.items() if name not in _QUANTISED}
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        config = _with_dtype(config, name)
        # Before 4.56 transformers knew torch_dtype alone.
        config = config if "dtype" in config else config | {"torch_dtype": name}
    if config != checkpoint.config and (folder / "config.json").is_file():
        write_json(folder / "config.json", config)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with another dtype wherever it names one: its parts (text, vision) have their own."""
    values = {name: _with_dtype(value, dtype) if isinstance(value, dict) else value for name, value in config.items()}
    return {name: dtype if name in ("dtype", "torch_dtype") else value for name, value in values.items()}


def _write_shard(checkpoint: Checkpoint, shard: str, folder: Path, changes: Changes, dtype: torch.dtype | None) -> int:
    """Write one shard and return its tensors' bytes.

    The format is written here, not by safetensors.torch.save_file, which wants every tensor of the file at once.
    """
    infos = {name: info for name, info in checkpoint.tensors.items() if info.shard == shard}
    to = "" if dtype is None else _NAMES[dtype]
    stored = {name: to if to and info.dtype in DTYPES else info.dtype for name, info in infos.items()}
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(infos, key=lambda name: (-_BYTES.get(stored[name], 1), name)):  # keeps every tensor aligned
        begin, end = end, end + infos[name].shape.numel() * _BYTES.get(stored[name], 1)
        header[name] = {"dtype": stored[name], "shape": list(infos[name].shape), "data_offsets": [begin, end]}
    with checkpoint.reader() as read, open(folder / shard, "wb") as file:
        encoded = json.dumps({"__metadata__": checkpoint.metadata[shard]} | header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in header:
            tensor = read(name)
            if isinstance(tensor, PackedWeight):
                tensor = tensor.dense(torch.promote_types(tensor.dtype, torch.float32))
            if name in changes:
                tensor = changes[name](tensor)
            if stored[name] in DTYPES:
                tensor = tensor.to(DTYPES[stored[name]])
                # As torch.isfinite(tensor).all(), whose temporaries are twice the tensor; both ends are NaN if one is.
                if (name in changes or to) and tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
                    raise AdapterFileError(f"{name} would not be finite in {tensor.dtype}; expected a wider --dtype")
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(encoded) + end:
            raise AdapterFileError(f"{shard} has {file.tell():,} bytes written; expected {8 + len(encoded) + end:,}")
    return end
